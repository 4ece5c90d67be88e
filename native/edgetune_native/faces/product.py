"""Weights with the change of an adapter."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgetune_native import _kernels

from .checks import array, stored_rows, thread_count

_F32 = np.dtype(np.float32)


class ProductFace:
    """Merging of low-rank adapters."""

    _kernels: _kernels.Kernels

    def add_product(
        self,
        rows: NDArray[np.float32] | NDArray[np.float16] | NDArray[np.uint16],
        left: NDArray[np.float32],
        right: NDArray[np.float32],
        *,
        threads: int = 0,
    ) -> NDArray[np.float32]:
        """Return rows + left @ right.

        Each element of the product is a chain of fused multiply-adds in the order of r, beginning with 0, and is then
        added to the weight in one addition: the same bits on every instruction set and for any number of threads.

        Args:
            rows: [n, k], float32, float16, or uint16 holding the bits of bfloat16. Not changed.
            left: [n, r] float32.
            right: [r, k] float32.
            threads: how many threads; 0 is one per core.

        Returns:
            [n, k] float32.

        Raises:
            TypeError, ValueError: an argument is not as described; ValueError names the first row of the result that
                is not finite.
        """
        source, dtype = stored_rows(rows)
        n, k = source.shape
        checked = array(left, "left", _F32, (n, None))
        r = checked.shape[1]
        other = array(right, "right", _F32, (r, k))
        out = np.empty((n, k), np.float32)
        self._kernels.add_product(source, dtype, checked, other, n, r, k, out, thread_count(threads))
        return out
