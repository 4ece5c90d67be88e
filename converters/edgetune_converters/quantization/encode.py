"""Encode a block of rows in its storage type."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import edgetune_native
from edgetune_converters.errors import RecipeError
from edgetune_converters.tensors import F32, widened

F16_MAX = 65504.0
# dtype of rows -> their storage type
_STORED = {np.dtype(np.float32): "f32", np.dtype(np.float16): "f16", np.dtype(np.uint16): "bf16"}


def encode_rows(
    rows: NDArray[Any], type_name: str, tensor: str, threads: int, weights: F32 | None = None
) -> NDArray[Any]:
    """Return a block in its storage type, bytes in file order; `weights` are importance weights, one per column.

    `rows` are f32, f16 or the bits of bf16; rows that have the type already are returned as they are.

    Raises RecipeError where f16 would overflow.
    """
    if type_name == _STORED[rows.dtype]:
        return rows
    if type_name == "f32":
        return widened(rows)
    if type_name == "f16" and _largest(rows) > F16_MAX:
        raise RecipeError(
            f"{tensor} holds weights beyond {F16_MAX:.0f}, the largest that f16 can store", "Use bf16, q8_0 or f32"
        )
    stored: NDArray[np.uint8] = edgetune_native.quantize(rows, type_name, weights=weights, threads=threads)
    return stored


def _largest(rows: NDArray[Any]) -> float:
    """The largest absolute value."""
    if rows.dtype == np.uint16:  # without the sign, the bits of floats have the order of the floats
        return float(widened(np.bitwise_and(rows, np.uint16(0x7FFF)).max(keepdims=True)).item())
    return max(float(rows.max()), -float(rows.min()))
