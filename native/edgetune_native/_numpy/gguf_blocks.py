"""GGUF types through libggml and ctypes. For some types libggml may end the process: those run in a child process."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import numpy as np
from numpy.typing import NDArray

from edgetune_native._kernels import Buffer

from ._floats import widen

__all__ = ["dequantize", "ggml_types", "open_ggml", "quantize"]

# The types that ggml_quantize_chunk can write; it ends the process on any other (native/src/ggml_abi.h).
_QUANTIZABLE = (0, 1, 30, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 20, 23, 21, 18, 22, 17, 16, 29, 19, 34, 35, 39, 40, 41, 42)

# iq3_s, iq3_xxs, iq2_s, iq2_xs, iq2_xxs, iq1_m, iq1_s: on extreme rows libggml fails an assertion and calls abort().
_MAY_ABORT = frozenset((21, 18, 22, 17, 16, 29, 19))

_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _Traits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _ToFloat),
        ("from_float_ref", ctypes.c_void_p),
    )


class _Ggml:
    """libggml-base with the signatures of ggml.h."""

    def __init__(self, path: str) -> None:
        self.path = path
        library = ctypes.CDLL(path)
        self.version = library.ggml_version
        self.version.restype = ctypes.c_char_p
        self.requires_imatrix = library.ggml_quantize_requires_imatrix
        self.requires_imatrix.restype = ctypes.c_bool
        self._traits = library.ggml_get_type_traits
        self._traits.restype = ctypes.POINTER(_Traits)
        self.quantize_chunk = library.ggml_quantize_chunk
        self.quantize_chunk.restype = ctypes.c_size_t
        self.quantize_chunk.argtypes = (
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
        )

    def traits(self, type_id: int) -> _Traits:
        traits: _Traits = self._traits(type_id).contents
        return traits


_ggml: _Ggml | None = None


def _library() -> _Ggml:
    if _ggml is None:
        raise RuntimeError("open_ggml has not been called")
    return _ggml


def open_ggml(path: str, /) -> str:
    """Open libggml-base and return its version."""
    global _ggml
    if _ggml is None:
        try:
            _ggml = _Ggml(path)
        except (OSError, AttributeError) as error:
            raise ImportError(f"{path} could not be used: {error}") from error
    version: bytes = _ggml.version()
    return version.decode()


def ggml_types() -> list[tuple[str, int, int, int, bool]]:
    """Return (name, id, block size, bytes per block, requires weights) of each type that can be quantized to."""
    library = _library()
    rows = []
    for type_id in _QUANTIZABLE:
        traits = library.traits(type_id)
        rows.append(
            (traits.type_name.decode(), type_id, traits.blck_size, traits.type_size, library.requires_imatrix(type_id))
        )
    return rows


def quantize(
    rows: Buffer, dtype: int, type_id: int, n: int, k: int, weights: Buffer | None, out: Buffer, threads: int, /
) -> None:
    """rows[n, k] -> out[n, row bytes]."""
    wide = widen(rows, dtype)
    if type_id in _MAY_ABORT:
        _quantize_in_child(wide, type_id, weights, out)
        return
    importance = None if weights is None else weights.ctypes.data
    written = _library().quantize_chunk(type_id, wide.ctypes.data, out.ctypes.data, 0, n, k, importance)
    if written != out.nbytes:
        raise RuntimeError("libggml wrote a number of bytes that differs from its row size")


# Row by row, so that the number of rows that come back shows the row at which libggml stopped. The output of libggml
# itself (to stdout) is discarded.
_CHILD = """
import ctypes, os, resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
path, type_id, n, k, row_bytes, weighted = sys.argv[1], *map(int, sys.argv[2:])
answer = os.fdopen(os.dup(1), "wb")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
chunk = ctypes.CDLL(path).ggml_quantize_chunk
chunk.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_char_p]
weights = sys.stdin.buffer.read(4 * k) if weighted else None
out = ctypes.create_string_buffer(row_bytes)
for row in range(n):
    chunk(type_id, sys.stdin.buffer.read(4 * k), out, 0, 1, k, weights)
    answer.write(out.raw)
    answer.flush()
"""


def _quantize_in_child(rows: NDArray[np.float32], type_id: int, weights: Buffer | None, out: Buffer) -> None:
    """Quantize rows[n, k] into out[n, row bytes] in a child process, which libggml may kill."""
    n, k = rows.shape
    numbers = (type_id, n, k, out.shape[1], int(weights is not None))
    child = subprocess.run(
        [sys.executable, "-I", "-c", _CHILD, _library().path, *map(str, numbers)],
        input=(b"" if weights is None else weights.tobytes()) + rows.tobytes(),
        capture_output=True,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        check=False,
    )
    if len(child.stdout) < out.nbytes:
        row = len(child.stdout) // out.shape[1]
        raise ValueError(
            f"libggml cannot quantize row {row} to this type: its values are not finite, too large or too small"
        )
    out[...] = np.frombuffer(child.stdout, np.uint8).reshape(out.shape)


def dequantize(blocks: Buffer, type_id: int, n: int, k: int, out: Buffer, threads: int, /) -> None:
    """blocks[n, row bytes] -> out[n, k] f32."""
    to_float = _library().traits(type_id).to_float
    if not to_float:  # f32 has no converter
        out[...] = blocks.view(np.float32) if n else 0
        return
    for row in range(n):
        to_float(blocks[row].ctypes.data, out[row].ctypes.data, k)
