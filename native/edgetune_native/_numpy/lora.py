"""rows + left @ right, with the fused multiply-add that NumPy lacks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgetune_native._kernels import Buffer

from ._floats import widen

__all__ = ["add_product"]


def add_product(
    rows: Buffer, dtype: int, left: Buffer, right: Buffer, n: int, r: int, k: int, out: Buffer, threads: int, /
) -> None:
    """rows[n, k] + left[n, r] @ right[r, k] f32 -> out[n, k] f32."""
    total = np.zeros((n, k), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for step in range(r):
            total = _fused(left[:, step, None], right[step], total)
        out[:] = widen(rows, dtype) + total
    wrong = np.flatnonzero(~np.isfinite(out).all(axis=1))
    if wrong.size:
        raise ValueError(f"row {wrong[0]} holds a NaN or an infinity, expected finite weights")


def _fused(a: NDArray[np.float32], b: NDArray[np.float32], c: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a b + c, rounded once.

    The product is exact in float64. The sum is rounded there to odd: of the two neighbors of an inexact sum the one
    whose last bit is 1, so that rounding again to float32, which has less than half of the bits, is right (Boldo and
    Melquiond, "Emulation of a FMA and correctly rounded sums", 2008).
    """
    product, addend = np.multiply(a, b, dtype=np.float64), c.astype(np.float64)
    total = np.asarray(product + addend)
    part = total - product
    error = (product - (total - part)) + (addend - part)  # Knuth's two-sum: the error of rounding
    bits = total.view(np.int64)
    outwards = (error > 0) == (total > 0)
    even = (error != 0) & np.isfinite(error) & (bits & 1 == 0)
    return (bits + np.where(even, np.where(outwards, 1, -1), 0)).view(np.float64).astype(np.float32)
