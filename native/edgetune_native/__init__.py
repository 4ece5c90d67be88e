"""Kernels of edgetune: quantization to GGUF types, comparison of logits, what this CPU can do.

The functions check their arguments and release the GIL. `EDGETUNE_PURE=1` selects a twin in numpy and ctypes instead of
the C extension (same results, slower); `EDGETUNE_ISA` (scalar, avx2, avx512, neon) overrides the choice of instruction
set, and the import fails if it cannot be honoured. Importing this package loads neither llama_cpp nor libggml; the
library is opened by the first function that needs it.
"""

from __future__ import annotations

import os

from ._kernels import Kernels
from .face import Face
from .results import AmxProbe, Comparison, Cpu, GgmlLibrary, GgmlType, LogProbCodes

__all__ = [
    "AmxProbe",
    "Comparison",
    "Cpu",
    "GgmlLibrary",
    "GgmlType",
    "LogProbCodes",
    "block_size",
    "compare",
    "cpu",
    "decode_log_probs",
    "dequantize",
    "encode_log_probs",
    "ggml_library",
    "ggml_type_id",
    "probe_amx",
    "quantize",
    "requires_weights",
    "row_bytes",
    "type_bytes",
    "types",
]


def _implementation() -> Kernels:
    if os.environ.get("EDGETUNE_PURE") == "1":
        from . import _twin

        return _twin
    from . import _native

    return _native


_face = Face(_implementation())

block_size = _face.block_size
compare = _face.compare
cpu = _face.cpu
decode_log_probs = _face.decode_log_probs
dequantize = _face.dequantize
encode_log_probs = _face.encode_log_probs
ggml_library = _face.ggml_library
ggml_type_id = _face.ggml_type_id
probe_amx = _face.probe_amx
quantize = _face.quantize
requires_weights = _face.requires_weights
row_bytes = _face.row_bytes
type_bytes = _face.type_bytes
types = _face.types
