"""DoRA: the rows of W + B @ A, scaled to trained magnitudes.

W' = m / |D + B @ A| * (W + B @ A), where the norms are those of rows, and D is the base as it was in training: QLoRA
trains on values of 4 bits, whose norms are not those of the original weights. An embedding is treated as its transpose.
Source: PEFT, tuners/lora/dora.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import edgetune_native
from edgetune_converters.tensors import ALL, F32, Read, RowIndex

_ROWS = 256  # of which the norms are computed at a time


@dataclass(frozen=True)
class ScaledRows:
    """The transform of a matrix [outputs, inputs] by factors left [outputs, r], right [r, inputs] and magnitudes."""

    factors: Callable[[], tuple[F32, F32]]
    magnitudes: Callable[[], F32]

    def __call__(self, base: Read, trained: Read) -> Read:
        left, right = self.factors()
        magnitudes = self.magnitudes().reshape(-1)
        whole = _NormsOfAllRows(trained, left, right)

        def read(rows: RowIndex, columns: RowIndex) -> F32:
            every = isinstance(columns, slice) and columns == ALL
            merged = _sum(base, left, right, rows, columns)
            if not every:
                norms = whole()[rows]
            else:
                norms = row_norms(merged if trained is base else _sum(trained, left, right, rows, columns))
            with np.errstate(divide="ignore", invalid="ignore"):
                scale = magnitudes[rows] / norms
            return merged * scale[:, None]

        return read


class _NormsOfAllRows:
    """The norms of all rows, computed when they are first needed: by readers of some of the columns."""

    def __init__(self, trained: Read, left: F32, right: F32) -> None:
        self._trained, self._left, self._right = trained, left, right
        self._lock = threading.Lock()
        self._norms: F32 | None = None

    def __call__(self) -> F32:
        with self._lock:
            if self._norms is None:
                count = len(self._left)
                blocks = [slice(first, min(first + _ROWS, count)) for first in range(0, count, _ROWS)]
                self._norms = np.concatenate(
                    [row_norms(_sum(self._trained, self._left, self._right, block, ALL)) for block in blocks]
                )
            return self._norms


def row_norms(rows: F32) -> F32:
    """Return the length of each row, summed in f64."""
    norms: F32 = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1)).astype(np.float32)
    return norms


def _sum(read: Read, left: F32, right: F32, rows: RowIndex, columns: RowIndex) -> F32:
    own, other = np.ascontiguousarray(left[rows]), np.ascontiguousarray(right[:, columns])
    merged: F32 = edgetune_native.add_product(np.ascontiguousarray(read(rows, columns)), own, other)
    return merged
