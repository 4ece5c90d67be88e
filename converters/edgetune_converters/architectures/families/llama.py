"""Llama and the families that differ from it in details: biases, norms of the heads, factors."""

from __future__ import annotations

from collections.abc import Callable

from edgetune_converters.architectures import rope
from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.architectures.families.common import (
    CONTEXT,
    DIMENSIONS,
    GRANITE_SCALES,
    LAYER,
    LAYER_NORM,
    LLAMA_METADATA,
    RMS,
    SILU,
    WINDOW,
    attention,
    even_heads,
    flag,
    gated_ffn,
    head,
    head_norms,
    norm,
    rope_permuted,
    trunk,
    window_note,
)
from edgetune_converters.architectures.table import Family, Head, TensorRow
from edgetune_converters.gguf.values import Value

_ROPES = rope.supported("default", "linear", "yarn")
_ROPES_LLAMA = rope.supported("default", "linear", "yarn", "llama3")

_POST_NORMS = (
    norm(LAYER + "post_attention_layernorm", "attention_post_norm"),
    norm(LAYER + "post_feedforward_layernorm", "ffn_post_norm"),
)
# the norms of query and key go over all heads at once
_OLMO = (
    *trunk(attention_norm=False, ffn_norm=False),
    *_POST_NORMS,
    *attention(),
    *head_norms(q=lambda c: (c.heads * c.head_dim,), k=lambda c: (c.kv_heads * c.head_dim,)),
    *gated_ffn(),
)


def _unrotated_every_fourth(config: ModelConfig) -> str | None:
    """A requirement: llama.cpp leaves every fourth layer of SmolLM3 without RoPE, whatever config.json says."""
    found = config.get("no_rope_layers")
    fixed = [int((layer + 1) % 4 != 0) for layer in range(config.layers)]
    if found is None or found == fixed:
        return None
    return f"no_rope_layers {found}: only every fourth layer can be without RoPE"


def _sequential(config: ModelConfig, layer: int) -> bool:
    return not config.get("use_parallel_residual", False)


def _stacked_norms(which: str, heads: Callable[[ModelConfig], int]) -> tuple[TensorRow, ...]:
    """A norm for each head, in the models that have them."""
    return (
        norm(
            LAYER + f"self_attn.{which}_layernorm.norms." + "{n}",
            f"attention_{which}_norm",
            head,
            stacked=heads,
            when=lambda config, layer: bool(config.get("qk_layernorm", False)),
        ),
    )


def _window_in_64_layers(config: ModelConfig) -> str | None:
    """A requirement: llama.cpp gives EXAONE 4 its window (and RoPE only there) by its number of layers, 64."""
    if (config.layers == 64) == (config.get("sliding_window") is not None):
        return None
    return (
        f"sliding_window {config.get('sliding_window')} with {config.layers} layers: only the 64 of the 32 B have one"
    )


def _if_sliding(make: Callable[[ModelConfig], Value | None]) -> Callable[[ModelConfig], Value | None]:
    return lambda config: None if config.get("sliding_window") is None else make(config)


_EXAONE_WINDOW = tuple((key, _if_sliding(make)) for key, make in WINDOW)

FAMILIES = (
    Family(
        name="Llama",
        hf=("LlamaForCausalLM",),
        gguf="llama",
        tensors=trunk() + attention(rope_permuted, qkv_bias=True, output_bias=True) + gated_ffn(bias=True),
        metadata=LLAMA_METADATA,
        generated=(rope.LLAMA3_FACTORS,),
        requirements=(SILU, _ROPES_LLAMA),
    ),
    Family(
        name="Mistral",
        hf=("MistralForCausalLM",),
        gguf="llama",
        tensors=trunk() + attention(rope_permuted) + gated_ffn(),
        metadata=LLAMA_METADATA,
        generated=(rope.LLAMA3_FACTORS,),
        requirements=(SILU, _ROPES_LLAMA),
        notes=(window_note,),
    ),
    Family(
        name="Qwen2",
        hf=("Qwen2ForCausalLM",),
        gguf="qwen2",
        tensors=trunk() + attention(qkv_bias=True) + gated_ffn(),
        metadata=LLAMA_METADATA,
        requirements=(SILU, _ROPES),
        notes=(window_note,),
    ),
    Family(
        name="Qwen3",
        hf=("Qwen3ForCausalLM",),
        gguf="qwen3",
        tensors=trunk() + attention(qkv_bias=True) + head_norms() + gated_ffn(),
        metadata=LLAMA_METADATA,
        requirements=(SILU, _ROPES),
        notes=(window_note,),
    ),
    Family(
        name="SmolLM3",
        hf=("SmolLM3ForCausalLM",),
        gguf="smollm3",
        tensors=trunk() + attention(rope_permuted) + gated_ffn(),
        metadata=LLAMA_METADATA,
        requirements=(SILU, _ROPES, _unrotated_every_fourth),
        notes=(window_note,),
        defaults={"tie_word_embeddings": True, "rope_theta": 2_000_000.0},
    ),
    Family(
        name="StableLM 2",
        hf=("StableLmForCausalLM",),
        gguf="stablelm",
        tensors=(
            *trunk(bias=True, ffn_norm=False),
            norm(LAYER + "post_attention_layernorm", "ffn_norm", bias=True, when=_sequential),
            *attention(qkv_bias=True),
            *_stacked_norms("q", lambda c: c.heads),
            *_stacked_norms("k", lambda c: c.kv_heads),
            *gated_ffn(),
        ),
        metadata=(
            *DIMENSIONS,
            CONTEXT,
            LAYER_NORM,
            *rope.METADATA,
            ("use_parallel_residual", flag("use_parallel_residual", False)),
        ),
        requirements=(SILU, even_heads, rope.supported("default", partial=True)),
        defaults={"partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5},
        head=Head.ALWAYS,
    ),
    Family(
        name="OLMo 2",
        hf=("Olmo2ForCausalLM",),
        gguf="olmo2",
        tensors=_OLMO,
        metadata=LLAMA_METADATA,
        requirements=(SILU, even_heads, _ROPES),
        head=Head.ALWAYS,
    ),
    Family(
        name="OLMo 3",
        hf=("Olmo3ForCausalLM",),
        gguf="olmo2",
        tensors=_OLMO,
        metadata=(*DIMENSIONS, CONTEXT, RMS, *rope.METADATA, *WINDOW),
        requirements=(SILU, even_heads, _ROPES, rope.local_unscaled, rope.one_theta),
        defaults={"sliding_window": 4096, "sliding_window_pattern": 4, "rope_theta": 500_000.0},
        head=Head.ALWAYS,
    ),
    Family(
        name="Granite",
        hf=("GraniteForCausalLM",),
        gguf="granite",
        tensors=trunk() + attention(rope_permuted, qkv_bias=True, output_bias=True) + gated_ffn(bias=True),
        metadata=(*LLAMA_METADATA, *GRANITE_SCALES),
        generated=(rope.LLAMA3_FACTORS,),
        requirements=(SILU, _ROPES_LLAMA),
    ),
    Family(
        name="EXAONE 4",
        hf=("Exaone4ForCausalLM",),
        gguf="exaone4",
        tensors=(
            *trunk(attention_norm=False, ffn_norm=False),
            *_POST_NORMS,
            *attention(),
            *head_norms(),
            *gated_ffn(),
        ),
        metadata=(*DIMENSIONS, CONTEXT, RMS, *rope.METADATA, *_EXAONE_WINDOW),
        generated=(rope.LLAMA3_FACTORS,),
        requirements=(SILU, even_heads, _window_in_64_layers, rope.supported("default", "linear", "yarn", "llama3")),
    ),
)
