"""Tensors of a checkpoint: their description, how rows are addressed, and how stored bytes become f32.

This module is the ground floor of the package: file readers, the architecture table and the merge all build on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

RowIndex = slice | NDArray[np.intp]
"""Rows (or columns) of a matrix: a range, or their numbers in any order."""
ALL = slice(None)

Read = Callable[[RowIndex, RowIndex], NDArray[Any]]
"""Reads rows and columns of a matrix, as f32 or as they are stored."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor on disk. `start` is its byte offset from the beginning of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    bytes: int


def _e4m3() -> F32:
    """Decode F8_E4M3: bias 7, no infinities, NaN where all bits but the sign are set."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    magnitude = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    values = np.where(codes & 0x80, -magnitude, magnitude)
    values[codes & 0x7F == 0x7F] = np.nan
    return values.astype(np.float32)


def _e5m2() -> F32:
    """Decode F8_E5M2: the upper half of an IEEE half-precision number."""
    return (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32)


FLOAT8: Mapping[str, F32] = {"F8_E4M3": _e4m3(), "F8_E5M2": _e5m2()}
"""The 8-bit floats of safetensors: the f32 value of each of the 256 bytes."""

FOUR_BIT = ("NF4", "FP4")
"""The dtypes of bitsandbytes' 4-bit weights."""
PACKED = ("GPTQ", "AWQ", "INT-PACKED", "NVFP4")
"""The dtypes of weights that are stored in parts under other names, with scales of groups of columns."""
BY_COLUMNS = ("GPTQ", "AWQ")
"""The dtypes of packed weights whose rows are columns on disk: each block of rows is spread over the whole tensor."""
QUANTIZED = (*FOUR_BIT, *PACKED, "INT8", "I8", "MXFP4", *FLOAT8)
"""Every dtype of a quantized weight that a checkpoint reader decodes."""


def to_f32(stored: NDArray[Any], dtype: str) -> F32:
    """Return stored weights as a fresh f32 array, exactly.

    Args:
        stored: The weights; bf16 as uint16, 8-bit floats as uint8.
        dtype: Their dtype as safetensors names it.
    """
    if dtype in FLOAT8:
        decoded: F32 = FLOAT8[dtype][stored]
        return decoded
    if dtype != "BF16":
        return stored.astype(np.float32)
    wide = stored.astype(np.uint32)
    np.left_shift(wide, 16, out=wide)
    return wide.view(np.float32)


def widened(rows: NDArray[Any]) -> F32:
    """Return rows of f32, f16 or bf16 (as uint16) in f32; rows that are f32 already are not copied."""
    return rows if rows.dtype == np.float32 else to_f32(rows, "BF16" if rows.dtype == np.uint16 else "F16")


def span(rows: RowIndex, count: int) -> tuple[int, int]:
    """Return the smallest range [first, last) of `count` rows that contains all of `rows`."""
    if isinstance(rows, slice):
        first, last, _ = rows.indices(count)
        return first, last
    return int(rows.min()), int(rows.max()) + 1
