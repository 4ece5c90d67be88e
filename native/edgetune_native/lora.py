"""Weights with the low-rank change of an adapter."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from . import _backend
from ._checks import F32, Rows, array, stored_rows, thread_count

__all__ = ["add_product"]


def add_product(
    rows: Rows, left: NDArray[np.float32], right: NDArray[np.float32], *, threads: int = 0
) -> NDArray[np.float32]:
    """Return rows + left @ right.

    Each element of the product is a chain of fused multiply-adds in the order of r that starts at 0; one addition then
    adds it to the weight. The result is the same to the bit on every instruction set and for any number of threads.

    Args:
        rows: [n, k] float32, float16, or uint16 holding the bits of bfloat16. Not changed.
        left: [n, r] float32.
        right: [r, k] float32.
        threads: number of threads; 0 means one per core.

    Returns:
        [n, k] float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, or a row of the result is not finite; the message names the first.
    """
    source, dtype = stored_rows(rows)
    n, k = source.shape
    checked = array(left, "left", F32, (n, None))
    r = checked.shape[1]
    other = array(right, "right", F32, (r, k))
    out = np.empty((n, k), np.float32)
    _backend.kernels.add_product(source, dtype, checked, other, n, r, k, out, thread_count(threads))
    return out
