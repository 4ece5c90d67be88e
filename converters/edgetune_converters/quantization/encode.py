"""A block of rows in its storage type, with the checks that belong to it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import edgetune_native
from edgetune_converters.errors import RecipeError
from edgetune_converters.tensors import F32, widened

F16_MAX = 65504.0
# dtype of rows as the base stores them -> the type that they have then
_STORED = {np.dtype(np.float32): "f32", np.dtype(np.float16): "f16", np.dtype(np.uint16): "bf16"}


def encode_rows(
    rows: NDArray[Any], type_name: str, tensor: str, threads: int, weights: F32 | None = None
) -> NDArray[Any]:
    """A block in its storage type, bytes in file order; `weights` says how much each column matters.

    `rows` are f32, f16 or the bits of bf16; they are returned themselves where they have the type already.
    Errors: RecipeError where f16 would overflow.
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
    if rows.dtype == np.uint16:  # without their signs, the bits of floats are ordered as the floats are
        return float(widened(np.bitwise_and(rows, np.uint16(0x7FFF)).max(keepdims=True)).item())
    return max(float(rows.max()), -float(rows.min()))
