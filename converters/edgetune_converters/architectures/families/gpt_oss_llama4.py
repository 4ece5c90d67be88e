"""gpt-oss and Llama 4, whose checkpoints hold all experts in one tensor, transposed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgetune_converters.architectures import rope
from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.architectures.families.common import (
    CONTEXT,
    DIMENSIONS,
    LAYER,
    OTHER_PARTS,
    RMS,
    SILU,
    TEXT_PART,
    WINDOW,
    attention,
    down,
    integer,
    norm,
    only,
    text_only_note,
    trunk,
    up,
)
from edgetune_converters.architectures.families.moe import EXPERT_COUNTS, Width, dense_width, router
from edgetune_converters.architectures.operations import Take, View
from edgetune_converters.architectures.table import Family, Head, TensorRow
from edgetune_converters.gguf.values import u32


def _turned_experts(
    width: Width, steps: Callable[[int], tuple[Take, ...]]
) -> Callable[[ModelConfig], tuple[View, ...]]:
    """Experts of [hidden, width] each, transposed; `steps` take rows from each expert's transposed matrix."""
    return lambda c: (View(steps(width(c)), transpose=Take(c.hidden, 0, c.hidden)),)


def _turned_down(config: ModelConfig) -> tuple[View, ...]:
    return (View(transpose=Take(config.ffn, 0, config.ffn)),)


def _stored_gate_up(config: ModelConfig) -> tuple[int, ...]:
    return config.experts, config.hidden, 2 * config.ffn


def _stored_down(config: ModelConfig) -> tuple[int, ...]:
    return config.experts, config.ffn, config.hidden


_OSS = LAYER + "mlp.experts."
_OSS_EXPERT: dict[str, Any] = {"weight": "", "bias": True, "bias_name": "_bias"}
# as it was published: in MXFP4, and not transposed
_OSS_PUBLISHED: dict[str, Any] = _OSS_EXPERT | {"weight": "_blocks"}


def _every_second(first: int) -> Callable[[ModelConfig], tuple[View, ...]]:
    """gpt-oss has gate and up in turn."""
    return _turned_experts(dense_width, lambda width: (Take(2, first, 1),))


def _published(first: int) -> Callable[[ModelConfig], tuple[View, ...]]:
    return lambda config: (View((Take(2, first, 1),)),)


def _published_gate_up(config: ModelConfig) -> tuple[int, ...]:
    return config.experts, 2 * config.ffn, config.hidden


def _published_down(config: ModelConfig) -> tuple[int, ...]:
    return config.experts, config.hidden, config.ffn


def _untruncated_note(config: ModelConfig) -> str | None:
    if config.rope["rope_type"] != "yarn" or config.rope.get("truncate", True):
        return None
    return (
        "YaRN without rounding (truncate: false): llama.cpp rounds the ends of the range of frequencies that it "
        "blends, which moves a few of them slightly"
    )


_GPT_OSS = Family(
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
        TensorRow(_OSS + "gate_up_proj", "expert_gate", _stored_gate_up, _every_second(0), **_OSS_EXPERT),
        TensorRow(_OSS + "gate_up_proj", "expert_up", _stored_gate_up, _every_second(1), **_OSS_EXPERT),
        TensorRow(_OSS + "down_proj", "expert_down", _stored_down, _turned_down, **_OSS_EXPERT),
        TensorRow(_OSS + "gate_up_proj", "expert_gate", _published_gate_up, _published(0), **_OSS_PUBLISHED),
        TensorRow(_OSS + "gate_up_proj", "expert_up", _published_gate_up, _published(1), **_OSS_PUBLISHED),
        TensorRow(_OSS + "down_proj", "expert_down", _published_down, **_OSS_PUBLISHED),
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
    defaults={"sliding_window": 128, "sliding_window_pattern": 2, "head_dim": 64},
    head=Head.ALWAYS,
)


def _mixed(config: ModelConfig, layer: int) -> bool:
    """Whether a layer of Llama 4 has experts."""
    return (layer + 1) % config.integer("interleave_moe_layer_step", 1) == 0


def _unmixed(config: ModelConfig, layer: int) -> bool:
    return not _mixed(config, layer)


def _dense_of_llama4(config: ModelConfig) -> int:
    return config.integer("intermediate_size_mlp")


def _halves(number: int) -> Callable[[ModelConfig], tuple[View, ...]]:
    """Llama 4 has all gates before all ups."""
    return _turned_experts(dense_width, lambda width: (Take(2 * width, number * width, width),))


def _like_scout_or_maverick(config: ModelConfig) -> str | None:
    """A requirement: what llama.cpp takes for granted of Llama 4."""
    layers = range(config.layers)
    fixed = {
        "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in layers],
        "moe_layers": [layer for layer in layers if _mixed(config, layer)],
        "attention_chunk_size": 8192,
        "floor_scale": 8192,
        "attn_scale": 0.1,
        "use_qk_norm": config.experts != 128,
    }
    wrong = [f"{key} {config.get(key)}" for key, value in fixed.items() if config.get(key, value) != value]
    return f"{', '.join(wrong)}: llama.cpp runs Llama 4 only as Scout and Maverick have it" if wrong else None


_FEED = LAYER + "feed_forward."
_LLAMA4 = Family(
    name="Llama 4 (text)",
    hf=("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
    gguf="llama4",
    tensors=(
        *trunk(),
        *attention(),
        TensorRow(_FEED + "gate_proj", "ffn_gate", lambda c: (_dense_of_llama4(c), c.hidden), when=_unmixed),
        TensorRow(_FEED + "up_proj", "ffn_up", lambda c: (_dense_of_llama4(c), c.hidden), when=_unmixed),
        TensorRow(_FEED + "down_proj", "ffn_down", lambda c: (c.hidden, _dense_of_llama4(c)), when=_unmixed),
        TensorRow(_FEED + "router", "expert_router", router, when=_mixed),
        TensorRow(_FEED + "experts.gate_up_proj", "expert_gate", _stored_gate_up, _halves(0), when=_mixed, weight=""),
        TensorRow(_FEED + "experts.gate_up_proj", "expert_up", _stored_gate_up, _halves(1), when=_mixed, weight=""),
        TensorRow(_FEED + "experts.down_proj", "expert_down", _stored_down, _turned_down, when=_mixed, weight=""),
        TensorRow(_FEED + "shared_expert.gate_proj", "shared_gate", up, when=_mixed),
        TensorRow(_FEED + "shared_expert.up_proj", "shared_up", up, when=_mixed),
        TensorRow(_FEED + "shared_expert.down_proj", "shared_down", down, when=_mixed),
    ),
    metadata=(
        *((key, make) for key, make in DIMENSIONS if key != "feed_forward_length"),
        CONTEXT,
        RMS,
        *rope.METADATA,
        *EXPERT_COUNTS,
        ("feed_forward_length", integer("intermediate_size_mlp")),
        ("expert_feed_forward_length", lambda config: u32(config.ffn)),
        ("interleave_moe_layer_step", lambda config: u32(config.integer("interleave_moe_layer_step", 1))),
    ),
    generated=(rope.LLAMA3_FACTORS,),
    requirements=(
        SILU,
        rope.supported("default", "llama3"),
        only("attention_bias", False),
        only("attn_temperature_tuning", True, 4),
        _like_scout_or_maverick,
    ),
    notes=(text_only_note,),
    renames=TEXT_PART,
    ignored=OTHER_PARTS,
)

FAMILIES = (_GPT_OSS, _LLAMA4)
