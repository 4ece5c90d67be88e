"""The share of each tensor's change that survives quantization, by layer and slot."""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgetune.validation.numbers import number
from edgetune_converters.provenance.receipts import Receipt

WEAKEST = 8
_BLOCK = re.compile(r"blk\.(\d+)\.(.+?)(?:\.weight)?")
OUTSIDE = ""
"""Layer of a tensor outside the layers: the embedding, the head."""


@dataclass(frozen=True)
class TensorSurvival:
    """One tensor that training changed."""

    name: str
    layer: str
    slot: str
    type: str
    ratio: float
    """<Q(W+D)-Q(W), D>/|D|^2: 1 = all of the change D, 0 = nothing."""


def tensor_survival(receipt: Receipt | None) -> list[TensorSurvival]:
    """Return every tensor whose survival the export measured; [] if it did not."""
    found = []
    for name, value in (receipt.survival or {}).items() if receipt else ():
        ratio = number(value)
        if ratio is None:
            continue
        match = _BLOCK.fullmatch(name)
        layer, slot = (match[1], match[2]) if match else (OUTSIDE, name.removesuffix(".weight"))
        found.append(TensorSurvival(name, layer, slot, (receipt.tensors if receipt else {}).get(name, ""), ratio))
    return found


def weakest(found: list[TensorSurvival]) -> list[TensorSurvival]:
    """Return the tensors that lost most, the worst first."""
    return sorted(found, key=lambda tensor: (tensor.ratio, tensor.name))[:WEAKEST]
