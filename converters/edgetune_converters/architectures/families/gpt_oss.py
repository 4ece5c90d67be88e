"""gpt-oss: attention sinks, and all experts of a layer in one tensor, transposed or (as published) in MXFP4.

Checkpoints made for 4-bit training and adapters keep each expert as two linear layers instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgetune_converters.architectures import rope
from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.architectures.families.common import (
    CONTEXT,
    DIMENSIONS,
    LAYER,
    RMS,
    SILU,
    WINDOW,
    attention,
    norm,
    only,
    trunk,
)
from edgetune_converters.architectures.families.experts import (
    EXPERT_COUNTS,
    dense_width,
    expert_count,
    router,
    stored_down,
    stored_gate_up,
    transposed_down,
    transposed_experts,
)
from edgetune_converters.architectures.operations import Take, View
from edgetune_converters.architectures.table import Family, FusedParameter, Head, Shape, TensorRow
from edgetune_converters.gguf.values import u32

_OSS = LAYER + "mlp.experts."
_OSS_EXPERT: dict[str, Any] = {"weight": "", "bias": True, "bias_name": "_bias"}
# as published: in MXFP4, and not transposed
_OSS_PUBLISHED: dict[str, Any] = _OSS_EXPERT | {"weight": "_blocks"}
# one by one: linear layers, so that 4-bit layers and LoRA fit them
_OSS_LISTED: dict[str, Any] = {"stacked": expert_count, "bias": True}


def _every_second(first: int) -> Callable[[ModelConfig], tuple[View, ...]]:
    """gpt-oss interleaves the rows of gate and up."""
    return transposed_experts(dense_width, lambda width: (Take(2, first, 1),))


def _published(first: int) -> Callable[[ModelConfig], tuple[View, ...]]:
    return lambda config: (View((Take(2, first, 1),)),)


def _published_gate_up(config: ModelConfig) -> tuple[int, ...]:
    return config.experts, 2 * config.ffn, config.hidden


def _published_down(config: ModelConfig) -> tuple[int, ...]:
    return config.experts, config.hidden, config.ffn


def _listed_gate_up(config: ModelConfig) -> tuple[int, ...]:
    return 2 * config.ffn, config.hidden


def _listed_down(config: ModelConfig) -> tuple[int, ...]:
    return config.hidden, config.ffn


def _in(parameter: str, shape: Shape) -> FusedParameter:
    return FusedParameter(_OSS + parameter, shape, lambda config: 0, transposed=True)


def _untruncated_note(config: ModelConfig) -> str | None:
    if config.rope["rope_type"] != "yarn" or config.rope.get("truncate", True):
        return None
    return (
        "YaRN without rounding (truncate: false): llama.cpp rounds the ends of the range of frequencies that it "
        "blends, which moves a few of them slightly"
    )


GPT_OSS = Family(
    name="gpt-oss",
    hf=("GptOssForCausalLM",),
    gguf="gpt-oss",
    tensors=(
        *trunk(ffn_norm=False),
        # llama.cpp's name for the norm before the experts
        norm(LAYER + "post_attention_layernorm", "attention_post_norm"),
        *attention(qkv_bias=True, output_bias=True),
        TensorRow(LAYER + "self_attn.sinks", "attention_sinks", lambda c: (c.heads,), weight=""),
        TensorRow(LAYER + "mlp.router", "expert_router", router, bias=True),
        TensorRow(_OSS + "gate_up_proj", "expert_gate", stored_gate_up, _every_second(0), **_OSS_EXPERT),
        TensorRow(_OSS + "gate_up_proj", "expert_up", stored_gate_up, _every_second(1), **_OSS_EXPERT),
        TensorRow(_OSS + "down_proj", "expert_down", stored_down, transposed_down, **_OSS_EXPERT),
        TensorRow(_OSS + "gate_up_proj", "expert_gate", _published_gate_up, _published(0), **_OSS_PUBLISHED),
        TensorRow(_OSS + "gate_up_proj", "expert_up", _published_gate_up, _published(1), **_OSS_PUBLISHED),
        TensorRow(_OSS + "down_proj", "expert_down", _published_down, **_OSS_PUBLISHED),
        *(
            TensorRow(
                _OSS + "gate_up_projs.{n}",
                slot,
                _listed_gate_up,
                _published(first),
                part_of=_in("gate_up_proj", stored_gate_up),
                **_OSS_LISTED,
            )
            for first, slot in enumerate(("expert_gate", "expert_up"))
        ),
        TensorRow(
            _OSS + "down_projs.{n}", "expert_down", _listed_down, part_of=_in("down_proj", stored_down), **_OSS_LISTED
        ),
    ),
    metadata=(
        *DIMENSIONS,
        CONTEXT,
        RMS,
        *rope.METADATA,
        *WINDOW,
        *EXPERT_COUNTS,
        ("expert_feed_forward_length", lambda config: u32(config.ffn)),
    ),
    requirements=(
        SILU,
        rope.supported("default", "yarn", untruncated=True),
        only("attention_bias", True),
        only("swiglu_alpha", 1.702),
        only("swiglu_limit", 7.0),
    ),
    notes=(_untruncated_note,),
    renames=((r"\.mlp\.router\.linear\b", ".mlp.router"),),
    loaded_names=(
        (r"\.mlp\.router\.linear\b", ".mlp.router"),
        (r"(\.mlp\.experts\.(gate_up|down)_proj)s\.\d+\.weight", r"\1"),
        (r"(\.mlp\.experts\.(gate_up|down)_proj)s\.\d+\.bias", r"\1_bias"),
    ),
    defaults={"sliding_window": 128, "sliding_window_pattern": 2, "head_dim": 64},
    head=Head.ALWAYS,
)
