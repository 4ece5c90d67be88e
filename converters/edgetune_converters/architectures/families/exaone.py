"""EXAONE 4: norms after attention and feed-forward layer, and a sliding window in the 32 B."""

from __future__ import annotations

from collections.abc import Callable

from edgetune_converters.architectures import rope
from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.architectures.decoder import Traits
from edgetune_converters.architectures.families.common import (
    CONTEXT,
    DIMENSIONS,
    LLAMA3_ROPES,
    POST_NORMS,
    QKV_BIASES,
    RMS,
    SILU,
    WINDOW,
    attention,
    even_heads,
    gated_ffn,
    head_norms,
    trunk,
    window,
    window_in_sliding_layers,
)
from edgetune_converters.architectures.table import Family
from edgetune_converters.gguf.values import Value


def _window_in_64_layers(config: ModelConfig) -> str | None:
    """Require a window exactly in models of 64 layers, where llama.cpp applies it (and RoPE only there)."""
    if (config.layers == 64) == (config.get("sliding_window") is not None):
        return None
    return (
        f"sliding_window {config.get('sliding_window')} with {config.layers} layers: only the 64 of the 32 B have one"
    )


def _if_sliding(make: Callable[[ModelConfig], Value | None]) -> Callable[[ModelConfig], Value | None]:
    return lambda config: None if config.get("sliding_window") is None else make(config)


def _rotation(config: ModelConfig, layer: int) -> str | None:
    """Rotate only the layers with a window, in models that have such layers."""
    return "global" if window(config) is None or config.slides(layer) else None


_EXAONE_WINDOW = tuple((key, _if_sliding(make)) for key, make in WINDOW)

EXAONE4 = Family(
    name="EXAONE 4",
    hf=("Exaone4ForCausalLM",),
    gguf="exaone4",
    gguf_biases=QKV_BIASES,
    tensors=(
        *trunk(attention_norm=False, ffn_norm=False),
        *POST_NORMS,
        *attention(),
        *head_norms(),
        *gated_ffn(),
    ),
    metadata=(*DIMENSIONS, CONTEXT, RMS, *rope.METADATA, *_EXAONE_WINDOW),
    generated=(rope.LLAMA3_FACTORS,),
    requirements=(SILU, even_heads, _window_in_64_layers, LLAMA3_ROPES),
    onnx=Traits(window=window_in_sliding_layers, rotation=_rotation),
)
