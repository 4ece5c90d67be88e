"""Checks of arguments that the parts of the face share; errors tell the value found and the value expected."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune_native import _kernels

_ROW_DTYPES = {
    np.dtype(np.float32): _kernels.F32,
    np.dtype(np.float16): _kernels.F16,
    np.dtype(np.uint16): _kernels.BF16,
}


def array(value: object, name: str, dtype: np.dtype[Any] | None, shape: tuple[int | None, ...]) -> NDArray[Any]:
    """Return `value` if it is a contiguous array of that dtype and shape (None: any length); copied if unaligned."""
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


def stored_rows(rows: object) -> tuple[NDArray[Any], int]:
    """Return rows of weights [n, k] in one of the types that models are stored in, and that type."""
    if not isinstance(rows, np.ndarray) or rows.dtype not in _ROW_DTYPES:
        found = f"dtype {rows.dtype}" if isinstance(rows, np.ndarray) else f"type {type(rows).__name__}"
        raise TypeError(f"rows has {found}, expected a numpy array of float32, float16 or uint16 (bfloat16 bits)")
    return array(rows, "rows", None, (None, None)), _ROW_DTYPES[rows.dtype]


def thread_count(threads: object) -> int:
    """Return the number of threads; 0 is one per core."""
    if isinstance(threads, bool) or not isinstance(threads, (int, np.integer)):
        raise TypeError(f"threads must be an int, not {type(threads).__name__}")
    if not 0 <= threads <= 4096:
        raise ValueError(f"threads is {threads}, expected 0 (one per core) to 4096")
    return int(threads)


def output(out: object, shape: tuple[int, int], source: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the array to write into: the caller's, if it fits and does not overlap the source, or a new one."""
    if out is None:
        return np.empty(shape, np.uint8)
    checked = array(out, "out", np.dtype(np.uint8), shape)
    if not checked.flags.writeable:
        raise ValueError("out is read-only")
    if np.may_share_memory(checked, source):
        raise ValueError("out overlaps rows")
    return checked
