"""Gemma 1 to 3: norms stored as differences from one, a tied head, windows in some layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from edgetune_converters.architectures import rope
from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.architectures.decoder import Traits
from edgetune_converters.architectures.families.common import (
    CAUSAL,
    CONTEXT,
    DIMENSIONS,
    LAYER,
    QKV_BIASES,
    RMS,
    TEXT_PART,
    TOWERS,
    WINDOW,
    attention,
    gated_ffn,
    head_norms,
    local_in_window,
    norm,
    number,
    only,
    plus_one,
    trunk,
    window_in_sliding_layers,
)
from edgetune_converters.architectures.table import Family, Head, MetadataRow, Requirement
from edgetune_converters.gguf.values import Value, f32

# fields that config.json may omit; the activation is misnamed in early config.json files
_DEFAULTS = {"tie_word_embeddings": True, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh"}
_GELU = only("hidden_activation", "gelu_pytorch_tanh")
_METADATA: tuple[MetadataRow, ...] = (*DIMENSIONS, CONTEXT, RMS, *rope.METADATA)
_POST_NORMS = (
    norm(LAYER + "post_attention_layernorm", "attention_post_norm", views=plus_one),
    norm(LAYER + "pre_feedforward_layernorm", "ffn_norm", views=plus_one),
    norm(LAYER + "post_feedforward_layernorm", "ffn_post_norm", views=plus_one),
)


def _scaled_like(layers_of_27b: int) -> Requirement:
    """Require attention scaled by the head size or, in the 27 B model, by hidden size per head, as llama.cpp does."""

    def check(config: ModelConfig) -> str | None:
        known = config.hidden // config.heads if config.layers == layers_of_27b else config.head_dim
        found = config.get("query_pre_attn_scalar", known)
        return None if found == known else f"query_pre_attn_scalar {found!r}: only {known} can be exported"

    return check


def _cap(field: str) -> Callable[[ModelConfig], Value | None]:
    return lambda config: None if config.get(field) is None else f32(config.number(field))


def _attention_scale(config: ModelConfig) -> float:
    return float(config.number("query_pre_attn_scalar", 256) ** -0.5)


def _soft_cap(field: str) -> Callable[[ModelConfig], float]:
    return lambda config: 0.0 if config.get(field) is None else config.number(field)


_TRAITS = Traits(
    activation=lambda config: config.get("hidden_activation") or "gelu_pytorch_tanh",
    embedding_scale=lambda config: float(config.hidden**0.5),
    scales_lookup=True,
)

GEMMA = Family(
    name="Gemma",
    hf=("GemmaForCausalLM",),
    gguf="gemma",
    gguf_biases=QKV_BIASES,
    tensors=trunk(norms=plus_one) + attention() + gated_ffn(),
    metadata=_METADATA,
    requirements=(CAUSAL, rope.supported("default", "linear", "yarn")),
    defaults=_DEFAULTS,
    head=Head.NEVER,
    onnx=_TRAITS,
)

GEMMA2 = Family(
    name="Gemma 2",
    hf=("Gemma2ForCausalLM",),
    gguf="gemma2",
    gguf_biases=QKV_BIASES,
    tensors=trunk(norms=plus_one, ffn_norm=False) + _POST_NORMS + attention() + gated_ffn(),
    metadata=(
        *_METADATA,
        *WINDOW,
        ("attn_logit_softcapping", number("attn_logit_softcapping")),
        ("final_logit_softcapping", number("final_logit_softcapping")),
    ),
    requirements=(CAUSAL, _GELU, _scaled_like(46), rope.supported("default")),
    defaults=_DEFAULTS
    | {
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
    },
    head=Head.NEVER,
    onnx=replace(
        _TRAITS,
        attention_scale=_attention_scale,
        attention_cap=_soft_cap("attn_logit_softcapping"),
        logit_cap=_soft_cap("final_logit_softcapping"),
        window=window_in_sliding_layers,
    ),
)

GEMMA3 = Family(
    name="Gemma 3 (text)",
    hf=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    gguf="gemma3",
    gguf_biases=QKV_BIASES,
    tensors=trunk(norms=plus_one, ffn_norm=False) + _POST_NORMS + attention() + head_norms(plus_one) + gated_ffn(),
    metadata=(
        *_METADATA,
        *WINDOW,
        *rope.LOCAL_METADATA,
        ("final_logit_softcapping", _cap("final_logit_softcapping")),
    ),
    requirements=(
        CAUSAL,
        _GELU,
        _scaled_like(62),
        only("attn_logit_softcapping"),
        rope.supported("default", "linear"),
        rope.local_unscaled,
    ),
    renames=TEXT_PART,
    towers=TOWERS,
    defaults=_DEFAULTS
    | {
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "max_position_embeddings": 131_072,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
    },
    onnx=replace(
        _TRAITS,
        attention_scale=_attention_scale,
        logit_cap=_soft_cap("final_logit_softcapping"),
        window=window_in_sliding_layers,
        rotation=local_in_window,
    ),
)
