"""The names by which an export is requested: formats, merge bases and ways to combine adapters. Imports nothing else of
the package, so a configuration can read it.

The merge base is what the delta of the adapter is added to: `original`, the base as it is stored, or `nf4`, the base
quantized to 4 bits and dequantized, as the training saw it. `auto` measures both and takes one of them.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

FormatName = Literal["gguf", "safetensors", "gguf-lora", "onnx"]
MergeBaseName = Literal["original", "nf4"]
MergeBaseOption = Literal[MergeBaseName, "auto"]
CombineName = Literal[
    "linear", "cat", "svd",
    "ties", "dare-linear", "dare-ties", "magnitude-prune",
    "ties-svd", "dare-linear-svd", "dare-ties-svd", "magnitude-prune-svd",
]  # fmt: skip
"""How several adapters become one change: `linear` adds their changes, of any kind, and `cat` those of LoRA. The others
prune A and B of LoRA first, or the products of A and B (`-svd`); with `svd` the sum gets a lower rank."""

ORIGINAL: Final = "original"
NF4: Final = "nf4"
AUTO: Final = "auto"
MERGE_BASES: tuple[MergeBaseName, ...] = get_args(MergeBaseName)
