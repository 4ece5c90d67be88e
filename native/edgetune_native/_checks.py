"""Checks of arguments, made before a kernel writes a byte.

A wrong type or dtype raises TypeError; a wrong value, length or shape raises ValueError. Messages state the value found
and the value expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _kernels

F32 = np.dtype(np.float32)

Rows = NDArray[np.float32] | NDArray[np.float16] | NDArray[np.uint16]
"""float32, float16, or uint16 holding the bits of bfloat16."""

ELEMENT_TYPES: dict[np.dtype[Any], int] = {
    np.dtype(np.float32): _kernels.F32,
    np.dtype(np.float16): _kernels.F16,
    np.dtype(np.uint16): _kernels.BF16,
}
"""The dtypes of `Rows`, as the kernels number them."""


def array(value: object, name: str, dtype: np.dtype[Any] | None, shape: tuple[int | None, ...]) -> NDArray[Any]:
    """Return `value` if it is a contiguous array of that dtype and shape (None: any length), copied if unaligned."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a numpy array, not {type(value).__name__}")
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{name} has dtype {value.dtype}, expected {dtype}")
    if value.ndim != len(shape) or any(want not in (None, have) for have, want in zip(value.shape, shape, strict=True)):
        expected = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} has shape {value.shape}, expected ({expected})")
    if not value.flags.c_contiguous:
        raise ValueError(f"{name} is not C-contiguous (strides {value.strides}); pass numpy.ascontiguousarray of it")
    return value if value.flags.aligned else value.copy()


def array_of(
    value: object, name: str, dtypes: Sequence[np.dtype[Any]], expected: str, shape: tuple[int | None, ...]
) -> NDArray[Any]:
    """Return `value` if it is a contiguous array of that shape and of one of the dtypes, which `expected` lists."""
    if not isinstance(value, np.ndarray) or value.dtype not in dtypes:
        found = f"dtype {value.dtype}" if isinstance(value, np.ndarray) else f"type {type(value).__name__}"
        raise TypeError(f"{name} has {found}, expected a numpy array of {expected}")
    return array(value, name, None, shape)


def stored_rows(
    rows: object, name: str = "rows", shape: tuple[int | None, int | None] = (None, None)
) -> tuple[NDArray[Any], int]:
    """Return rows [n, k] of an element type in which models store weights or logits, and that type."""
    expected = "float32, float16 or uint16 (bfloat16 bits)"
    checked = array_of(rows, name, tuple(ELEMENT_TYPES), expected, shape)
    return checked, ELEMENT_TYPES[checked.dtype]


def importance_weights(weights: object, k: int) -> NDArray[np.float32] | None:
    """Return the importance of `k` columns, finite and not negative; None if there is none."""
    if weights is None:
        return None
    checked: NDArray[np.float32] = array(weights, "weights", F32, (k,))
    wrong = np.flatnonzero(~(np.isfinite(checked) & (checked >= 0)))
    if wrong.size:
        raise ValueError(f"weights[{wrong[0]}] is {checked[wrong[0]]}, expected a finite number not below 0")
    return checked


def integer(value: object, name: str) -> int:
    """Return an int, also one of NumPy's; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    return int(value)


def thread_count(threads: object) -> int:
    """Return a number of threads; 0 means one per core."""
    count = integer(threads, "threads")
    if not 0 <= count <= 4096:
        raise ValueError(f"threads is {count}, expected 0 (one per core) to 4096")
    return count


def output(out: object, shape: tuple[int, ...], dtype: np.dtype[Any], *sources: NDArray[Any]) -> NDArray[Any]:
    """Return the array to write into: the caller's, if it fits and overlaps no source, or a new one."""
    if out is None:
        return np.empty(shape, dtype)
    checked = array(out, "out", dtype, shape)
    if checked is not out:
        raise ValueError("out is not aligned to its elements")
    if not checked.flags.writeable:
        raise ValueError("out is read-only")
    if any(np.may_share_memory(checked, source) for source in sources):
        raise ValueError("out overlaps an input")
    return checked
