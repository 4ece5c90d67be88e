"""MiniCPM: Llama with scaled embedding, residual stream and logits."""

from __future__ import annotations

from edgetune_converters.architectures import rope
from edgetune_converters.architectures.decoder import Traits
from edgetune_converters.architectures.families.common import (
    EVERY_BIAS,
    LLAMA_METADATA,
    SILU,
    attention,
    gated_ffn,
    only,
    rope_permuted,
    stated,
    trunk,
)
from edgetune_converters.architectures.table import Family
from edgetune_converters.gguf.values import f32

MINICPM = Family(
    name="MiniCPM",
    hf=("MiniCPMForCausalLM",),
    gguf="minicpm",
    gguf_biases=EVERY_BIAS,
    tensors=trunk() + attention(rope_permuted) + gated_ffn(),
    metadata=(
        *LLAMA_METADATA,
        ("embedding_scale", lambda config: f32(config.number("scale_emb"))),
        ("residual_scale", lambda config: f32(config.number("scale_depth") / config.layers**0.5)),
        ("logit_scale", lambda config: f32(config.hidden / config.number("dim_model_base"))),
    ),
    generated=rope.LONG_FACTORS,
    requirements=(SILU, rope.supported("default", "linear", "yarn", *rope.LONGROPE), only("num_experts", 0)),
    defaults={"tie_word_embeddings": True},
    onnx=Traits(
        embedding_scale=stated("scale_emb"),
        scales_lookup=True,
        residual_scale=lambda config: config.number("scale_depth") / config.layers**0.5,
        logit_scale=lambda config: config.number("dim_model_base") / config.hidden,
    ),
)
