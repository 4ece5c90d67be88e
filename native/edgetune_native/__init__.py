"""Kernels of edgetune: GGUF types, blocks for ONNX, adapters, the formats of bitsandbytes, comparison of logits.

The functions check their arguments and release the GIL. `EDGETUNE_PURE=1` selects a twin in numpy and ctypes instead of
the C extension (same results, slower); `EDGETUNE_ISA` (scalar, avx2, avx512, neon) overrides the choice of instruction
set, and the import fails if it cannot be honoured. Importing this package loads neither llama_cpp nor libggml; the
library is opened by the first function that needs it.
"""

from __future__ import annotations

import os

from ._kernels import Kernels
from .face import Face
from .results import AmxProbe, Comparison, Cpu, FourBit, GgmlLibrary, GgmlType, LogProbCodes, NBits, NestedAbsmax

__all__ = [
    "AmxProbe",
    "Comparison",
    "Cpu",
    "FourBit",
    "GgmlLibrary",
    "GgmlType",
    "LogProbCodes",
    "NBits",
    "NestedAbsmax",
    "absmax_mean",
    "add_product",
    "block_absmax",
    "block_size",
    "compare",
    "cpu",
    "decode_log_probs",
    "dequantize",
    "dequantize_4bit",
    "dequantize_blocks",
    "dequantize_int8",
    "encode_log_probs",
    "ggml_library",
    "ggml_type_id",
    "nested_scales",
    "nf4_roundtrip",
    "probe_amx",
    "quantize",
    "quantize_4bit",
    "quantize_blocks",
    "requires_weights",
    "row_bytes",
    "saved_4bit",
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

absmax_mean = _face.absmax_mean
add_product = _face.add_product
block_absmax = _face.block_absmax
block_size = _face.block_size
compare = _face.compare
cpu = _face.cpu
decode_log_probs = _face.decode_log_probs
dequantize = _face.dequantize
dequantize_4bit = _face.dequantize_4bit
dequantize_blocks = _face.dequantize_blocks
dequantize_int8 = _face.dequantize_int8
encode_log_probs = _face.encode_log_probs
ggml_library = _face.ggml_library
ggml_type_id = _face.ggml_type_id
nested_scales = _face.nested_scales
nf4_roundtrip = _face.nf4_roundtrip
probe_amx = _face.probe_amx
quantize = _face.quantize
quantize_4bit = _face.quantize_4bit
quantize_blocks = _face.quantize_blocks
requires_weights = _face.requires_weights
row_bytes = _face.row_bytes
saved_4bit = _face.saved_4bit
type_bytes = _face.type_bytes
types = _face.types
