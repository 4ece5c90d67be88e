"""Element types of rows as float32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgetune_native._kernels import BF16, Buffer


def widen(rows: Buffer, dtype: int) -> NDArray[np.float32]:
    """Return the values as float32, which holds those of every element type exactly."""
    if dtype == BF16:
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float32, copy=False)
