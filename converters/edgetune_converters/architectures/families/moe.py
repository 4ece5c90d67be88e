"""Families with a mixture of experts, and the rows that all of these share: Mixtral, Qwen-MoE, Granite-MoE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgetune_converters.architectures import rope
from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.architectures.families.common import (
    GRANITE_SCALES,
    LAYER,
    LLAMA_METADATA,
    SILU,
    attention,
    even_heads,
    head_norms,
    integer,
    only,
    rope_permuted,
    trunk,
    window_note,
)
from edgetune_converters.architectures.operations import Take, View
from edgetune_converters.architectures.table import Family, FusedParameter, Head, MetadataRow, Shape, TensorRow, When

Width = Callable[[ModelConfig], int]

# Mixtral and Granite call the block otherwise in their checkpoints than transformers does now
_SPARSE_BLOCK = (r"\.block_sparse_moe\.", ".mlp.")


def router(config: ModelConfig) -> tuple[int, ...]:
    """The matrix that rates the experts."""
    return config.experts, config.hidden


def _count(config: ModelConfig) -> int:
    return config.experts


def _none(config: ModelConfig) -> int:
    return 0


def _half(width: Width, number: int) -> Callable[[ModelConfig], tuple[View, ...]]:
    """Gate (0) or up (1) of a tensor that holds both, one below the other, for each expert."""
    return lambda c: (View((Take(2 * width(c), number * width(c), width(c)),)),)


def expert_rows(width: Width, name: str = LAYER + "mlp.experts", when: When | None = None) -> tuple[TensorRow, ...]:
    """All experts of a layer in one tensor, from checkpoints with one tensor an expert or with all of them fused."""
    into: Shape = lambda c: (width(c), c.hidden)  # noqa: E731
    back: Shape = lambda c: (c.hidden, width(c))  # noqa: E731
    fused: Shape = lambda c: (c.experts, 2 * width(c), c.hidden)  # noqa: E731
    fused_back: Shape = lambda c: (c.experts, *back(c))  # noqa: E731
    each: dict[str, Any] = {"stacked": _count} | ({"when": when} if when else {})
    whole: dict[str, Any] = {"weight": ""} | ({"when": when} if when else {})
    gates, ups = (FusedParameter(name + ".gate_up_proj", fused, first) for first in (_none, width))
    downs = FusedParameter(name + ".down_proj", fused_back, _none)
    return (
        TensorRow(name + ".{n}.gate_proj", "expert_gate", into, part_of=gates, **each),
        TensorRow(name + ".{n}.up_proj", "expert_up", into, part_of=ups, **each),
        TensorRow(name + ".{n}.down_proj", "expert_down", back, part_of=downs, **each),
        TensorRow(name + ".gate_up_proj", "expert_gate", fused, _half(width, 0), **whole),
        TensorRow(name + ".gate_up_proj", "expert_up", fused, _half(width, 1), **whole),
        TensorRow(name + ".down_proj", "expert_down", fused_back, **whole),
    )


def expert_width(config: ModelConfig) -> int:
    """Width of one expert where it is not that of a dense layer."""
    return config.integer("moe_intermediate_size")


def dense_width(config: ModelConfig) -> int:
    """Width of one expert where no layer is dense."""
    return config.ffn


def _shared(config: ModelConfig) -> int:
    return config.integer("shared_expert_intermediate_size")


EXPERT_COUNTS: tuple[MetadataRow, ...] = (
    ("expert_count", integer("num_experts")),
    ("expert_used_count", integer("num_experts_per_tok")),
)
EXPERT_WIDTH: MetadataRow = ("expert_feed_forward_length", integer("moe_intermediate_size"))
_ROUTER = TensorRow(LAYER + "mlp.gate", "expert_router", router)
_EVERY_LAYER = (only("decoder_sparse_step", 1), only("mlp_only_layers", []))
_ROPES = rope.supported("default", "linear", "yarn")
_SHARED = LAYER + "mlp.shared_expert"


FAMILIES = (
    Family(
        name="Mixtral",
        hf=("MixtralForCausalLM",),
        gguf="llama",
        tensors=(*trunk(), *attention(rope_permuted), _ROUTER, *expert_rows(dense_width)),
        metadata=(*LLAMA_METADATA, *EXPERT_COUNTS),
        requirements=(SILU, _ROPES),
        notes=(window_note,),
        renames=(
            _SPARSE_BLOCK,
            (r"(\.experts\.\d+)\.w1", r"\1.gate_proj"),
            (r"(\.experts\.\d+)\.w2", r"\1.down_proj"),
            (r"(\.experts\.\d+)\.w3", r"\1.up_proj"),
        ),
    ),
    Family(
        name="Qwen2-MoE",
        hf=("Qwen2MoeForCausalLM",),
        gguf="qwen2moe",
        tensors=(
            *trunk(),
            *attention(qkv_bias=True),
            _ROUTER,
            *expert_rows(expert_width),
            TensorRow(_SHARED + ".gate_proj", "shared_gate", lambda c: (_shared(c), c.hidden)),
            TensorRow(_SHARED + ".up_proj", "shared_up", lambda c: (_shared(c), c.hidden)),
            TensorRow(_SHARED + ".down_proj", "shared_down", lambda c: (c.hidden, _shared(c))),
            # one row, which llama.cpp wants as a vector
            TensorRow(_SHARED + "_gate", "shared_router", lambda c: (1, c.hidden), out=lambda c: (c.hidden,)),
        ),
        metadata=(
            *LLAMA_METADATA,
            *EXPERT_COUNTS,
            EXPERT_WIDTH,
            ("expert_shared_feed_forward_length", integer("shared_expert_intermediate_size")),
        ),
        requirements=(SILU, _ROPES, even_heads, only("norm_topk_prob", False), *_EVERY_LAYER),
        notes=(window_note,),
        head=Head.ALWAYS,
    ),
    Family(
        name="Qwen3-MoE",
        hf=("Qwen3MoeForCausalLM",),
        gguf="qwen3moe",
        tensors=(*trunk(), *attention(qkv_bias=True), *head_norms(), _ROUTER, *expert_rows(expert_width)),
        metadata=(*LLAMA_METADATA, *EXPERT_COUNTS, EXPERT_WIDTH),
        requirements=(SILU, _ROPES, only("norm_topk_prob", True), *_EVERY_LAYER),
        notes=(window_note,),
        defaults={"norm_topk_prob": False},
    ),
    Family(
        name="Granite-MoE",
        hf=("GraniteMoeForCausalLM",),
        gguf="granitemoe",
        tensors=(*trunk(), *attention(rope_permuted), _ROUTER, *expert_rows(dense_width)),
        metadata=(*LLAMA_METADATA, *EXPERT_COUNTS, *GRANITE_SCALES),
        generated=(rope.LLAMA3_FACTORS,),
        requirements=(SILU, rope.supported("default", "linear", "yarn", "llama3")),
        renames=(
            _SPARSE_BLOCK,
            (r"\.input_linear\.weight", ".experts.gate_up_proj"),
            (r"\.output_linear\.weight", ".experts.down_proj"),
            (r"\.router\.layer", ".gate"),
        ),
    ),
)
