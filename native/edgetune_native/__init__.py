"""Kernels of edgetune: GGUF types, blocks for ONNX, LoRA merging, the formats of bitsandbytes, comparison of logits.

Every function checks its arguments and releases the GIL while it works. `EDGETUNE_PURE=1` selects the NumPy reference
backend instead of the C extension (same results, slower). `EDGETUNE_ISA` (scalar, avx2, avx512, neon) overrides the
choice of instruction set; the import fails if this CPU does not have it. Importing this package loads neither llama_cpp
nor libggml; the library is opened by the first function that needs it.
"""

from __future__ import annotations

from . import bitsandbytes, gguf_blocks, llama_slots, logits, lora, onnx_blocks, processor, results
from .bitsandbytes import *  # noqa: F403 - each module's __all__ is its part of the public API
from .gguf_blocks import *  # noqa: F403
from .llama_slots import *  # noqa: F403
from .logits import *  # noqa: F403
from .lora import *  # noqa: F403
from .onnx_blocks import *  # noqa: F403
from .processor import *  # noqa: F403
from .results import *  # noqa: F403

__all__: list[str] = []
__all__ += bitsandbytes.__all__
__all__ += gguf_blocks.__all__
__all__ += llama_slots.__all__
__all__ += logits.__all__
__all__ += lora.__all__
__all__ += onnx_blocks.__all__
__all__ += processor.__all__
__all__ += results.__all__
