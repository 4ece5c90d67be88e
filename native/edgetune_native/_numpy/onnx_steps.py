"""Operations on blocks that both searches share. Arrays are [block_size, blocks]: a column is a block."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = np.float32
Floats = NDArray[np.float32]

_ROUNDER = F32(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds |x| < 2^22 to an integer, half to even
SMALLEST = np.finfo(np.float32).tiny


def round_even(x: Any) -> Any:
    """Round to an integer, half to even."""
    return (x + _ROUNDER) - _ROUNDER


def round_half_up(x: Any) -> Any:
    """Round to an integer, half up; x is not negative."""
    even = round_even(x)
    return np.where(x - even == F32(0.5), even + F32(1), even)


def clamp(x: Any, low: Any, high: Any) -> Any:
    """Limit x to low .. high."""
    return np.minimum(np.maximum(x, low), high)


def inverse_of(scale: Floats) -> Floats:
    """Return 1 / scale, and 0 for 0."""
    inverse: Floats = np.where(scale != 0, F32(1) / scale, F32(0))
    return inverse


def add_rows(terms: NDArray[Any]) -> NDArray[Any]:
    """Add the rows in order; the order in which NumPy's own sum adds them is not defined."""
    total: NDArray[Any] = functools.reduce(np.add, terms)
    return total
