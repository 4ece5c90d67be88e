"""Products of factors, the same to the bit on every instruction set and for any number of threads."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import edgetune_native
from edgetune_converters.tensors import ALL, F32, Read, RowIndex, widened

_ROWS = 256  # of the base, read at a time


def matrix_product(left: F32, right: F32, threads: int = 0) -> F32:
    """Return left [n, r] @ right [r, k]. Raises ValueError where the product is not finite."""
    zeros = np.zeros((len(left), right.shape[1]), np.float16)
    found: F32 = edgetune_native.add_product(
        zeros, np.ascontiguousarray(left), np.ascontiguousarray(right), threads=threads
    )
    return found


def product(left: F32, right: F32, rows: RowIndex, columns: RowIndex) -> F32:
    """Rows and columns of left @ right; for a stack of experts, rows are numbered through all experts."""
    if left.ndim == 2:
        return matrix_product(left[rows], right[:, columns])
    numbers = np.arange(left.shape[0] * left.shape[1])[rows] if isinstance(rows, slice) else rows
    expert, inside = np.divmod(numbers, left.shape[1])
    found = [product(left[one], right[one], inside[expert == one], columns) for one in np.unique(expert)]
    return np.concatenate(found)


def is_zero_product(left: F32, right: F32) -> bool:
    """Whether left @ right is zero."""
    return _squared_norm(left, right) == 0


def _squared_norm(left: F32, right: F32) -> float:
    """|left @ right|^2, computed from two r x r matrices; over all experts of a stack."""
    if not left.any() or not right.any():
        return 0.0
    if left.ndim == 3:
        return sum(_squared_norm(one, other) for one, other in zip(left, right, strict=True))
    wide_left, wide_right = left.astype(np.float64), right.astype(np.float64)
    return max(0.0, float(np.sum((wide_left.T @ wide_left) * (wide_right @ wide_right.T))))


def columns_combined(read: Read, right: F32, rows: NDArray[np.intp]) -> F32:
    """Return W [n, k] @ right [k, r] for some rows of a matrix W, which is read in blocks."""
    blocks = (rows[first : first + _ROWS] for first in range(0, len(rows), _ROWS))
    return np.concatenate([matrix_product(widened(read(block, ALL)), right) for block in blocks])


def rows_combined(left: F32, read: Read) -> F32:
    """Return left [r, n] @ W [n, k] for a matrix W that is read in blocks of rows."""
    count = left.shape[1]
    blocks = (slice(first, min(first + _ROWS, count)) for first in range(0, count, _ROWS))
    parts = (matrix_product(left[:, block], widened(read(block, ALL))) for block in blocks)
    first = next(parts)
    for part in parts:
        first += part
    return first
