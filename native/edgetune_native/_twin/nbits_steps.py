"""The operations on blocks that both searches share. Arrays are [block_size, blocks]: a column is a block."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = np.float32
Floats = NDArray[np.float32]

_ROUNDER = F32(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds |x| < 2^22 to a whole number, half to even
SMALLEST = np.finfo(np.float32).tiny


def round_even(x: Any) -> Any:
    """To a whole number, half to even."""
    return (x + _ROUNDER) - _ROUNDER


def round_half_up(x: Any) -> Any:
    """To a whole number, half up; x is not negative."""
    even = round_even(x)
    return np.where(x - even == F32(0.5), even + F32(1), even)


def clamp(x: Any, low: Any, high: Any) -> Any:
    """The number between two bounds that is nearest to x."""
    return np.minimum(np.maximum(x, low), high)


def inverse_of(scale: Floats) -> Floats:
    """1 / scale, and 0 for 0."""
    inverse: Floats = np.where(scale != 0, F32(1) / scale, F32(0))
    return inverse


def add_rows(terms: NDArray[Any]) -> NDArray[Any]:
    """Add up down the columns, one row after the other; numpy's own sum may pair the terms otherwise."""
    total: NDArray[Any] = functools.reduce(np.add, terms)
    return total
