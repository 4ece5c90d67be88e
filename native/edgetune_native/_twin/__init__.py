"""The numpy twin of the C extension (`EDGETUNE_PURE=1`): the same functions without compiled code of ours.

Quantizing and dequantizing call the same libggml through ctypes, one thread, so the bytes are the same. Everything else
is written in numpy from its formula. `threads` is accepted and has no effect.
"""

from __future__ import annotations

from .bitsandbytes import (
    absmax_4bit,
    dequantize_4bit,
    dequantize_int8,
    nest_absmax,
    quantize_4bit,
    roundtrip_4bit,
    torch_mean,
    unnest_absmax,
)
from .ggml import dequantize, ggml_types, open_ggml, quantize
from .logits import compare, decode_log_probs, encode_log_probs
from .machine import cpu, probe_amx
from .nbits import dequantize_blocks, quantize_blocks
from .product import add_product

__all__ = [
    "absmax_4bit",
    "add_product",
    "compare",
    "cpu",
    "decode_log_probs",
    "dequantize",
    "dequantize_4bit",
    "dequantize_blocks",
    "dequantize_int8",
    "encode_log_probs",
    "ggml_types",
    "nest_absmax",
    "open_ggml",
    "probe_amx",
    "quantize",
    "quantize_4bit",
    "quantize_blocks",
    "roundtrip_4bit",
    "torch_mean",
    "unnest_absmax",
]
