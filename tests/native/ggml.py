"""libggml through ctypes, written apart from the product: what the tests compare with."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

import edgetune_native

_library = ctypes.CDLL(edgetune_native.ggml_library().path)
_library.ggml_quantize_chunk.restype = ctypes.c_size_t
_library.ggml_quantize_chunk.argtypes = [
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_void_p,
]
_library.ggml_row_size.restype = ctypes.c_size_t
_library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]

ALL_TYPES = edgetune_native.types()
NEEDS_WEIGHTS = tuple(name for name in ALL_TYPES if edgetune_native.requires_weights(name))
MAY_REFUSE = ("iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s")
"""Types whose quantizer in libggml fails assertions on extreme rows."""


def row_size(type_name: str, k: int) -> int:
    return int(_library.ggml_row_size(edgetune_native.ggml_type_id(type_name), k))


def quantize(
    rows: NDArray[np.float32], type_name: str, weights: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """One call of ggml_quantize_chunk over all rows [n, k]."""
    n, k = rows.shape
    out = np.full((n, row_size(type_name, k)), 0xA5, np.uint8)
    written = _library.ggml_quantize_chunk(
        edgetune_native.ggml_type_id(type_name),
        rows.ctypes.data,
        out.ctypes.data,
        0,
        n,
        k,
        None if weights is None else weights.ctypes.data,
    )
    assert written == out.nbytes
    return out
