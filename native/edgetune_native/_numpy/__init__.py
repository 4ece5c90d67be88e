"""The NumPy reference backend (`EDGETUNE_PURE=1`): the functions of the C extension without compiled code of ours.

Quantizing and dequantizing GGUF types call the same libggml through ctypes on one thread, so the bytes are the same.
All other functions are written in NumPy from their formulas. `threads` is accepted and has no effect.
"""

from __future__ import annotations

from .bitsandbytes import *  # noqa: F403 - each module's __all__ is its part of `Kernels`
from .gguf_blocks import *  # noqa: F403
from .logits import *  # noqa: F403
from .lora import *  # noqa: F403
from .onnx_blocks import *  # noqa: F403
from .processor import *  # noqa: F403
