"""Delta survival: the share of the trained delta that survives quantization.

For each tensor <Q(W+D)-Q(W), D>/|D|^2: 1 means whole, 0 vanished.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

import edgetune_native
from edgetune_converters.merging.stream import RowBlock
from edgetune_converters.tensors import F32

Store = Callable[[F32], NDArray[Any]]
"""Encodes f32 rows as in the file: the same storage type and the same importance weights."""


class DeltaSurvival:
    """Sums over the blocks of each tensor that an adapter changed."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[int, tuple[float, float]]] = {}

    def add(self, name: str, type_name: str, block: RowBlock, stored: NDArray[Any], store: Store) -> None:
        """Add one block; `stored` is the block as written, `store` encodes other rows in the same way.

        Thread-safe.
        """
        assert block.delta is not None
        change = block.delta().reshape(block.rows.shape)
        base = block.rows - change
        if type_name == "f32":
            moved = block.rows - base
        else:
            width = block.rows.shape[1]
            moved = _restored(stored, type_name, width) - _restored(store(base), type_name, width)
        delta = change.ravel().astype(np.float64)
        sums = float(delta @ moved.ravel()), float(delta @ delta)
        self._sums.setdefault(name, {})[block.first] = sums

    def ratios(self) -> dict[str, float]:
        """Return the survival of each changed tensor."""
        # sums in the order of the rows, whatever order the blocks came in
        ordered = {name: [sums[first] for first in sorted(sums)] for name, sums in sorted(self._sums.items())}
        added = {name: [math.fsum(each) for each in zip(*sums, strict=True)] for name, sums in ordered.items()}
        return {name: along / norm for name, (along, norm) in added.items() if norm}


def _restored(stored: NDArray[Any], type_name: str, width: int) -> F32:
    restored: F32 = edgetune_native.dequantize(stored, type_name, width)
    return restored
