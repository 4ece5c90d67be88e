"""How much of each tensor's change survived quantization, as layer x slot."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edgetune.report.gather import Json
from edgetune.report.numbers import number

WEAKEST = 8
_BLOCK = re.compile(r"blk\.(\d+)\.(.+?)(?:\.weight)?")
OUTSIDE = ""
"""Layer of a tensor that is in no layer: the embedding, the head."""


@dataclass(frozen=True)
class TensorSurvival:
    """One changed tensor."""

    name: str
    layer: str
    slot: str
    type: str
    ratio: float
    """<Q(W+D)-Q(W), D>/|D|^2: 1 whole, 0 vanished."""


def tensors(receipt: Json) -> list[TensorSurvival]:
    """Every tensor whose survival the export measured; [] when it did not."""
    return list(_tensors(receipt.get("survival"), receipt.get("tensors")))


def _tensors(survival: Any, types: Any) -> Iterator[TensorSurvival]:
    types = types if isinstance(types, Mapping) else {}
    for name, value in (survival if isinstance(survival, Mapping) else {}).items():
        ratio = number(value)
        if ratio is None:
            continue
        match = _BLOCK.fullmatch(name)
        layer, slot = (match[1], match[2]) if match else (OUTSIDE, name.removesuffix(".weight"))
        yield TensorSurvival(name, layer, slot, str(types.get(name, "")), ratio)


def weakest(found: list[TensorSurvival]) -> list[TensorSurvival]:
    """The tensors that lost most, the worst first."""
    return sorted(found, key=lambda tensor: (tensor.ratio, tensor.name))[:WEAKEST]
