"""`general.size_label`, such as 1.2B or 8x7B, by the rules of llama.cpp's converter.

A plausible size in the model's name is used (docs/gguf.md of ggml, "Naming Convention"). Otherwise the parameters are
counted; of a mixture of experts, those of one expert and the shared ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator

_IN_NAME = re.compile(
    r"(?P<before>A|\d+x)?(?P<number>\d+(?:[._]\d+)?)(?P<unit>[KMBT])(?P<after>\d?)|small|mini|medium|large|x?xl", re.I
)
_UNITS = "KMBT"
_EXPERTS = "_exps."


def size_label(name: str, tensors: Iterable[tuple[str, tuple[int, ...]]]) -> str:
    """Return the size label of a model.

    Args:
        name: Name of the model, or its repository.
        tensors: GGUF names and shapes, ([experts,] rows, columns).
    """
    total, each, counts = 0, 0, []
    for tensor, shape in tensors:
        size = math.prod(shape)
        experts = shape[-3] if _EXPERTS in tensor and len(shape) > 2 else 1
        counts += [experts] if _EXPERTS in tensor and len(shape) > 2 else []
        total, each = total + size, each + size // experts
    experts = sum(counts) // len(counts) if counts else 0
    return _named(name, total) or (f"{experts}x" if experts else "") + format_count(each)


def format_count(count: int) -> str:
    """Return a parameter count with at least two digits: 1235814400 -> 1.2B."""
    power = next((power for power in (4, 3, 2) if count > 1000**power), 1)
    scaled = count / 1000**power
    digits = max(0, 2 - len(str(round(scaled)).lstrip("0")))
    return f"{scaled:.{digits}f}{_UNITS[power - 1]}"


def _named(name: str, total: int) -> str:
    """Return the sizes in a name; "" for none."""
    parts = [part for part in name.rpartition("/")[2].split("-") if part]
    found = dict.fromkeys(_labels(parts[1:], total))  # without repetitions
    with_numbers = [label for label in found if not label.isalpha()]
    return "-".join(with_numbers or found)


def _labels(parts: Iterable[str], total: int) -> Iterator[str]:
    for part in parts:
        match = _IN_NAME.fullmatch(part)
        if match is None:
            continue
        if match["number"] is None:
            yield part
            continue
        number, unit = match["number"].replace("_", "."), match["unit"].upper()
        number += f".{match['after']}" if match["after"] else ""  # 7b1 of BLOOM
        size = float(number) * 1000 ** (1 + _UNITS.index(unit)) if number.count(".") < 2 else total
        if match["before"] or abs(size - total) <= 7 * total // 8:  # other numbers are context lengths
            yield f"{match['before'] or ''}{number}{unit}"
