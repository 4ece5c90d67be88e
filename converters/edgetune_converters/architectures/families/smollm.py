"""SmolLM3: Llama with every fourth layer left without RoPE."""

from __future__ import annotations

from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.architectures.decoder import Traits
from edgetune_converters.architectures.families.common import (
    LLAMA_METADATA,
    QKV_BIASES,
    SILU,
    YARN_ROPES,
    attention,
    gated_ffn,
    rope_permuted,
    trunk,
    window_in_later_layers,
    window_note,
)
from edgetune_converters.architectures.table import Family


def _unrotated_every_fourth(config: ModelConfig) -> str | None:
    """Require every fourth layer without RoPE, as llama.cpp has it whatever config.json says."""
    found = config.get("no_rope_layers")
    fixed = [int((layer + 1) % 4 != 0) for layer in range(config.layers)]
    if found is None or found == fixed:
        return None
    return f"no_rope_layers {found}: only every fourth layer can be without RoPE"


def _rotation(config: ModelConfig, layer: int) -> str | None:
    stated = config.get("no_rope_layers")
    rotated = stated[layer] if stated else (layer + 1) % config.get("no_rope_layer_interval", 4)
    return "global" if rotated else None


SMOLLM3 = Family(
    name="SmolLM3",
    hf=("SmolLM3ForCausalLM",),
    gguf="smollm3",
    gguf_biases=QKV_BIASES,
    tensors=trunk() + attention(rope_permuted) + gated_ffn(),
    metadata=LLAMA_METADATA,
    requirements=(SILU, YARN_ROPES, _unrotated_every_fourth),
    notes=(window_note,),
    defaults={"tie_word_embeddings": True, "rope_theta": 2_000_000.0},
    onnx=Traits(window=window_in_later_layers, rotation=_rotation),
)
