"""Qwen2 and Qwen3, dense and with experts: a bias at query, key and value, then norms of the heads."""

from __future__ import annotations

from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.architectures.decoder import Traits
from edgetune_converters.architectures.families.common import (
    LAYER,
    LLAMA_METADATA,
    SILU,
    YARN_ROPES,
    attention,
    even_heads,
    gated_ffn,
    head_norms,
    integer,
    only,
    trunk,
    window_in_later_layers,
    window_note,
)
from edgetune_converters.architectures.families.experts import (
    EXPERT_COUNTS,
    EXPERT_WIDTH,
    ROUTER,
    expert_rows,
    expert_width,
)
from edgetune_converters.architectures.table import Family, Head, TensorRow

_ROUTED = (only("decoder_sparse_step", 1), only("mlp_only_layers", []))  # experts in every layer
_SHARED = LAYER + "mlp.shared_expert"


def _shared(config: ModelConfig) -> int:
    return config.integer("shared_expert_intermediate_size")


def _normalized(config: ModelConfig) -> bool:
    return bool(config.get("norm_topk_prob", False))


QWEN2 = Family(
    name="Qwen2",
    hf=("Qwen2ForCausalLM",),
    biased=True,
    gguf="qwen2",
    tensors=trunk() + attention(qkv_bias=True) + gated_ffn(),
    metadata=LLAMA_METADATA,
    requirements=(SILU, YARN_ROPES),
    notes=(window_note,),
    onnx=Traits(window=window_in_later_layers),
)

QWEN3 = Family(
    name="Qwen3",
    hf=("Qwen3ForCausalLM",),
    gguf="qwen3",
    tensors=trunk() + attention(qkv_bias=True) + head_norms() + gated_ffn(),
    metadata=LLAMA_METADATA,
    requirements=(SILU, YARN_ROPES),
    notes=(window_note,),
    onnx=Traits(window=window_in_later_layers),
)

QWEN2_MOE = Family(
    name="Qwen2-MoE",
    hf=("Qwen2MoeForCausalLM",),
    biased=True,
    gguf="qwen2moe",
    tensors=(
        *trunk(),
        *attention(qkv_bias=True),
        ROUTER,
        *expert_rows(expert_width),
        TensorRow(_SHARED + ".gate_proj", "shared_gate", lambda c: (_shared(c), c.hidden)),
        TensorRow(_SHARED + ".up_proj", "shared_up", lambda c: (_shared(c), c.hidden)),
        TensorRow(_SHARED + ".down_proj", "shared_down", lambda c: (c.hidden, _shared(c))),
        # one row, which is a vector in llama.cpp
        TensorRow(_SHARED + "_gate", "shared_router", lambda c: (1, c.hidden), out=lambda c: (c.hidden,)),
    ),
    metadata=(
        *LLAMA_METADATA,
        *EXPERT_COUNTS,
        EXPERT_WIDTH,
        ("expert_shared_feed_forward_length", integer("shared_expert_intermediate_size")),
    ),
    requirements=(SILU, YARN_ROPES, even_heads, only("norm_topk_prob", False), *_ROUTED),
    notes=(window_note,),
    head=Head.ALWAYS,
    onnx=Traits(window=window_in_later_layers, normalized_experts=_normalized),
)

QWEN3_MOE = Family(
    name="Qwen3-MoE",
    hf=("Qwen3MoeForCausalLM",),
    gguf="qwen3moe",
    tensors=(*trunk(), *attention(qkv_bias=True), *head_norms(), ROUTER, *expert_rows(expert_width)),
    metadata=(*LLAMA_METADATA, *EXPERT_COUNTS, EXPERT_WIDTH),
    requirements=(SILU, YARN_ROPES, only("norm_topk_prob", True), *_ROUTED),
    notes=(window_note,),
    defaults={"norm_topk_prob": False},
    implied={"norm_topk_prob": True},
    onnx=Traits(window=window_in_later_layers, normalized_experts=_normalized),
)
