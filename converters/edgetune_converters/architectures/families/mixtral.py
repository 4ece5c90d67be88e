"""Mixtral: Llama with a mixture of experts in every layer."""

from __future__ import annotations

from edgetune_converters.architectures.decoder import Traits
from edgetune_converters.architectures.families.common import (
    ATTENTION_BIASES,
    LLAMA_METADATA,
    SILU,
    YARN_ROPES,
    attention,
    rope_permuted,
    trunk,
    window_everywhere,
    window_note,
)
from edgetune_converters.architectures.families.experts import (
    EXPERT_COUNTS,
    ROUTER,
    SPARSE_BLOCK,
    dense_width,
    expert_rows,
)
from edgetune_converters.architectures.table import Family

MIXTRAL = Family(
    name="Mixtral",
    hf=("MixtralForCausalLM",),
    gguf="llama",
    gguf_biases=ATTENTION_BIASES,
    tensors=(*trunk(), *attention(rope_permuted), ROUTER, *expert_rows(dense_width)),
    metadata=(*LLAMA_METADATA, *EXPERT_COUNTS),
    requirements=(SILU, YARN_ROPES),
    notes=(window_note,),
    renames=(
        SPARSE_BLOCK,
        (r"(\.experts\.\d+)\.w1", r"\1.gate_proj"),
        (r"(\.experts\.\d+)\.w2", r"\1.down_proj"),
        (r"(\.experts\.\d+)\.w3", r"\1.up_proj"),
    ),
    stored_names=(
        (r"\.mlp\.(gate|experts)\.", r".block_sparse_moe.\1."),
        (r"(\.experts\.\d+)\.gate_proj", r"\1.w1"),
        (r"(\.experts\.\d+)\.down_proj", r"\1.w2"),
        (r"(\.experts\.\d+)\.up_proj", r"\1.w3"),
    ),
    onnx=Traits(window=window_everywhere),
)
