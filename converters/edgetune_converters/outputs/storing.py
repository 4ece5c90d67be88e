"""A block of rows in its storage type, with the checks that belong to it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import edgetune_native
from edgetune_converters.checkpoint import F32
from edgetune_converters.errors import RecipeError

F16_MAX = 65504.0


def store(rows: F32, type_name: str, tensor: str, threads: int, weights: F32 | None = None) -> NDArray[Any]:
    """A block in its storage type, bytes in file order; `weights` says how much each column matters.

    Errors: RecipeError where f16 would overflow.
    """
    if type_name == "f32":
        return rows
    if type_name == "f16" and max(float(rows.max()), -float(rows.min())) > F16_MAX:
        raise RecipeError(
            f"{tensor} holds weights beyond {F16_MAX:.0f}, the largest that f16 can store", "Use bf16, q8_0 or f32"
        )
    stored: NDArray[np.uint8] = edgetune_native.quantize(rows, type_name, weights=weights, threads=threads)
    return stored
