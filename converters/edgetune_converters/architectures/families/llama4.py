"""Llama 4 (text): experts in some layers, all of them in one tensor, transposed."""

from __future__ import annotations

from collections.abc import Callable

from edgetune_converters.architectures import rope
from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.architectures.families.common import (
    CONTEXT,
    DIMENSIONS,
    LAYER,
    QKV_BIASES,
    RMS,
    SILU,
    TEXT_PART,
    TOWERS,
    attention,
    down,
    integer,
    only,
    trunk,
    up,
)
from edgetune_converters.architectures.families.experts import (
    EXPERT_COUNTS,
    dense_width,
    router,
    stored_down,
    stored_gate_up,
    transposed_down,
    transposed_experts,
)
from edgetune_converters.architectures.operations import Take, View
from edgetune_converters.architectures.table import Family, TensorRow
from edgetune_converters.gguf.values import u32


def _mixed(config: ModelConfig, layer: int) -> bool:
    """Whether a layer has experts."""
    return (layer + 1) % config.integer("interleave_moe_layer_step", 1) == 0


def _unmixed(config: ModelConfig, layer: int) -> bool:
    return not _mixed(config, layer)


def _dense_of_llama4(config: ModelConfig) -> int:
    return config.integer("intermediate_size_mlp")


def _halves(number: int) -> Callable[[ModelConfig], tuple[View, ...]]:
    """Llama 4 concatenates all gates and all ups."""
    return transposed_experts(dense_width, lambda width: (Take(2 * width, number * width, width),))


def _like_scout_or_maverick(config: ModelConfig) -> str | None:
    """Require what llama.cpp assumes of Llama 4."""
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
LLAMA4 = Family(
    name="Llama 4 (text)",
    hf=("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
    gguf="llama4",
    gguf_biases=QKV_BIASES,
    tensors=(
        *trunk(),
        *attention(),
        TensorRow(_FEED + "gate_proj", "ffn_gate", lambda c: (_dense_of_llama4(c), c.hidden), when=_unmixed),
        TensorRow(_FEED + "up_proj", "ffn_up", lambda c: (_dense_of_llama4(c), c.hidden), when=_unmixed),
        TensorRow(_FEED + "down_proj", "ffn_down", lambda c: (c.hidden, _dense_of_llama4(c)), when=_unmixed),
        TensorRow(_FEED + "router", "expert_router", router, when=_mixed),
        TensorRow(_FEED + "experts.gate_up_proj", "expert_gate", stored_gate_up, _halves(0), when=_mixed, weight=""),
        TensorRow(_FEED + "experts.gate_up_proj", "expert_up", stored_gate_up, _halves(1), when=_mixed, weight=""),
        TensorRow(_FEED + "experts.down_proj", "expert_down", stored_down, transposed_down, when=_mixed, weight=""),
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
    renames=TEXT_PART,
    towers=TOWERS,
)
