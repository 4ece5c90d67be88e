"""Granite, dense and with experts: Llama with scaled embedding, attention, residual stream and logits."""

from __future__ import annotations

from edgetune_converters.architectures import rope
from edgetune_converters.architectures.decoder import Traits
from edgetune_converters.architectures.families.common import (
    LLAMA3_ROPES,
    LLAMA_METADATA,
    QKV_BIASES,
    SILU,
    attention,
    gated_ffn,
    number,
    rope_permuted,
    stated,
    trunk,
)
from edgetune_converters.architectures.families.experts import (
    EXPERT_COUNTS,
    ROUTER,
    SPARSE_BLOCK,
    dense_width,
    expert_rows,
)
from edgetune_converters.architectures.table import Family, MetadataRow

_SCALES: tuple[MetadataRow, ...] = (
    ("attention.scale", number("attention_multiplier")),
    ("embedding_scale", number("embedding_multiplier")),
    ("residual_scale", number("residual_multiplier")),
    ("logit_scale", number("logits_scaling")),
)
_TRAITS = Traits(
    attention_scale=stated("attention_multiplier"),
    embedding_scale=stated("embedding_multiplier"),
    residual_scale=stated("residual_multiplier"),
    logit_scale=lambda config: 1 / config.number("logits_scaling"),
)

GRANITE = Family(
    name="Granite",
    hf=("GraniteForCausalLM",),
    gguf="granite",
    tensors=trunk() + attention(rope_permuted, qkv_bias=True, output_bias=True) + gated_ffn(bias=True),
    metadata=(*LLAMA_METADATA, *_SCALES),
    generated=(rope.LLAMA3_FACTORS,),
    requirements=(SILU, LLAMA3_ROPES),
    onnx=_TRAITS,
)

GRANITE_MOE = Family(
    name="Granite-MoE",
    hf=("GraniteMoeForCausalLM",),
    gguf="granitemoe",
    gguf_biases=QKV_BIASES,
    tensors=(*trunk(), *attention(rope_permuted), ROUTER, *expert_rows(dense_width)),
    metadata=(*LLAMA_METADATA, *EXPERT_COUNTS, *_SCALES),
    generated=(rope.LLAMA3_FACTORS,),
    requirements=(SILU, LLAMA3_ROPES),
    renames=(
        SPARSE_BLOCK,
        (r"\.input_linear\.weight", ".experts.gate_up_proj"),
        (r"\.output_linear\.weight", ".experts.down_proj"),
        (r"\.router\.layer", ".gate"),
    ),
    stored_names=(
        (r"\.mlp\.experts\.gate_up_proj", ".block_sparse_moe.input_linear.weight"),
        (r"\.mlp\.experts\.down_proj", ".block_sparse_moe.output_linear.weight"),
        (r"\.mlp\.gate\.", ".block_sparse_moe.router.layer."),
    ),
    fused_experts=True,
    onnx=_TRAITS,
)
