"""Command-R and R7B: parallel branches under one norm, a scaled head that is the embedding."""

from __future__ import annotations

from dataclasses import replace

from edgetune_converters.architectures import rope
from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.architectures.decoder import Traits
from edgetune_converters.architectures.families.common import (
    CLASSIC_METADATA,
    LAYER,
    QKV_BIASES,
    SILU,
    WINDOW,
    YARN_ROPES,
    attention,
    even_heads,
    gated_ffn,
    norm,
    number,
    only,
    stated,
    trunk,
    window_in_sliding_layers,
)
from edgetune_converters.architectures.table import Family, Head, Shape, TensorRow


def _norms_in_64_layers(config: ModelConfig) -> str | None:
    """Require norms of the heads exactly from 64 layers on, where llama.cpp expects them."""
    found = bool(config.get("use_qk_norm", False))
    if found == (config.layers >= 64):
        return None
    return f"use_qk_norm {found} with {config.layers} layers: llama.cpp has such norms from 64 on, and always then"


def _head_norm(which: str, shape: Shape) -> TensorRow:
    name = LAYER + f"self_attn.{which}_norm"
    return norm(name, f"attention_{which}_norm", shape, when=lambda c, layer: bool(c.get("use_qk_norm", False)))


# attention and feed-forward layer share one norm
_COHERE = (*trunk(ffn_norm=False), *attention(), *gated_ffn())
_COHERE_METADATA = (*CLASSIC_METADATA, *rope.METADATA, ("logit_scale", number("logit_scale")))
_TRAITS = Traits(norm="layer", interleaved=True, parallel=lambda config: True, logit_scale=stated("logit_scale"))

COMMAND_R = Family(
    name="Command-R",
    hf=("CohereForCausalLM",),
    gguf="command-r",
    gguf_biases=QKV_BIASES,
    tensors=(
        *_COHERE,
        _head_norm("q", lambda c: (c.heads, c.head_dim)),
        _head_norm("k", lambda c: (c.kv_heads, c.head_dim)),
    ),
    metadata=_COHERE_METADATA,
    requirements=(SILU, even_heads, YARN_ROPES, only("attention_bias", False), _norms_in_64_layers),
    defaults={"tie_word_embeddings": True, "logit_scale": 0.0625},
    head=Head.NEVER,
    onnx=_TRAITS,
)

COMMAND_R7B = Family(
    name="Command-R7B",
    hf=("Cohere2ForCausalLM",),
    gguf="cohere2",
    gguf_biases=QKV_BIASES,
    tensors=_COHERE,
    metadata=(*_COHERE_METADATA, *WINDOW),
    requirements=(SILU, even_heads, rope.supported("default"), only("attention_bias", False)),
    defaults={
        "tie_word_embeddings": True,
        "logit_scale": 0.0625,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    },
    head=Head.NEVER,
    onnx=replace(
        _TRAITS,
        window=window_in_sliding_layers,
        rotation=lambda config, layer: "global" if config.slides(layer) else None,
    ),
)
