"""The two 8-bit floats of safetensors, as tables of the 256 values that a byte can mean."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray


def _e4m3() -> NDArray[np.float32]:
    """F8_E4M3: bias 7, no infinities, NaN where all bits but the sign are set."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    magnitude = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    values = np.where(codes & 0x80, -magnitude, magnitude)
    values[codes & 0x7F == 0x7F] = np.nan
    return values.astype(np.float32)


def _e5m2() -> NDArray[np.float32]:
    """F8_E5M2: the upper half of an IEEE half-precision number."""
    return (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32)


TABLES: Mapping[str, NDArray[np.float32]] = {"F8_E4M3": _e4m3(), "F8_E5M2": _e5m2()}
