"""Families whose code transformers does not have: Llama with its tensors arranged otherwise."""

from __future__ import annotations

from edgetune_converters.architectures import rope, slots
from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.architectures.families.common import (
    CONTEXT,
    DIMENSIONS,
    LAYER,
    LLAMA_METADATA,
    RMS,
    SILU,
    attention,
    attention_output,
    down,
    embedding,
    even_heads,
    gated_ffn,
    norm,
    only,
    qkv_groups,
    query_key_value,
    rope_permuted,
    trunk,
    up,
)
from edgetune_converters.architectures.operations import RopePermute, Take, View
from edgetune_converters.architectures.table import Family, Head, TensorRow, Views
from edgetune_converters.gguf.values import f32

_ROPES = ("default", "linear", "yarn")
_BAICHUAN2_VOCABULARY = 125_696
_LAYERS_OF_7B, _LAYERS_OF_13B = 32, 40


def _grouped(part: int, *, rotated: bool) -> Views:
    """Query (0), key (1) or value (2) from groups of the query heads of a key head, that and its value."""
    return lambda c: (View((qkv_groups(c)[part], *((RopePermute(c.head_dim),) if rotated else ()))),)


def _third(part: int, *, rotated: bool) -> Views:
    """Query (0), key (1) or value (2) of a matrix in which they stand below one another, all of one size."""

    def views(config: ModelConfig) -> tuple[View, ...]:
        take = Take(3 * config.hidden, part * config.hidden, config.hidden)
        return (View((take, RopePermute(config.head_dim)) if rotated and config.layers == _LAYERS_OF_7B else (take,)),)

    return views


def _normalized_head(config: ModelConfig) -> tuple[View, ...]:
    """Baichuan 2 divides each row of its head by its length when it runs; its vocabulary tells it from the first."""
    return (View(unit=config.vocab_size == _BAICHUAN2_VOCABULARY),)


def _rotated_by_layers(config: ModelConfig) -> str | None:
    """A requirement: llama.cpp gives Baichuan RoPE when it has 32 layers, and ALiBi when it has 40."""
    if config.layers in (_LAYERS_OF_7B, _LAYERS_OF_13B):
        return None
    return f"{config.layers} layers: only the 7 B of Baichuan, with 32, and the 13 B, with 40, can be carried"


def _dynamic_note(config: ModelConfig) -> str | None:
    if config.rope["rope_type"] != "dynamic":
        return None
    stated = config.integer("max_position_embeddings")
    return f"dynamic RoPE scaling begins past {stated} tokens; llama.cpp has none, and agrees up to there"


_QKV = LAYER + "attention.wqkv"

FAMILIES = (
    Family(
        name="MiniCPM",
        hf=("MiniCPMForCausalLM",),
        gguf="minicpm",
        tensors=trunk() + attention(rope_permuted) + gated_ffn(),
        metadata=(
            *LLAMA_METADATA,
            ("embedding_scale", lambda config: f32(config.number("scale_emb"))),
            ("residual_scale", lambda config: f32(config.number("scale_depth") / config.layers**0.5)),
            ("logit_scale", lambda config: f32(config.hidden / config.number("dim_model_base"))),
        ),
        generated=rope.LONG_FACTORS,
        requirements=(SILU, rope.supported(*_ROPES, *rope.LONGROPE), only("num_experts", 0)),
        defaults={"tie_word_embeddings": True},
    ),
    Family(
        name="InternLM2",
        hf=("InternLM2ForCausalLM",),
        gguf="internlm2",
        tensors=(
            TensorRow("model.tok_embeddings", slots.EMBEDDING, embedding),
            norm("model.norm", "output_norm"),
            TensorRow("output", slots.OUTPUT, embedding, tied_to="model.tok_embeddings"),
            norm(LAYER + "attention_norm", "attention_norm"),
            norm(LAYER + "ffn_norm", "ffn_norm"),
            TensorRow(_QKV, "attention_q", query_key_value, _grouped(0, rotated=True)),
            TensorRow(_QKV, "attention_k", query_key_value, _grouped(1, rotated=True)),
            TensorRow(_QKV, "attention_v", query_key_value, _grouped(2, rotated=False)),
            TensorRow(LAYER + "attention.wo", "attention_output", attention_output),
            TensorRow(LAYER + "feed_forward.w1", "ffn_gate", up),
            TensorRow(LAYER + "feed_forward.w3", "ffn_up", up),
            TensorRow(LAYER + "feed_forward.w2", "ffn_down", down),
        ),
        metadata=LLAMA_METADATA,
        requirements=(SILU, even_heads, rope.supported(*_ROPES, "dynamic"), only("bias", False)),
        notes=(_dynamic_note,),
        head=Head.ALWAYS,
    ),
    Family(
        name="Baichuan",
        hf=("BaichuanForCausalLM", "BaiChuanForCausalLM"),
        gguf="baichuan",
        tensors=(
            TensorRow("model.embed_tokens", slots.EMBEDDING, embedding),
            norm("model.norm", "output_norm"),
            TensorRow("lm_head", slots.OUTPUT, embedding, _normalized_head),
            norm(LAYER + "input_layernorm", "attention_norm"),
            norm(LAYER + "post_attention_layernorm", "ffn_norm"),
            TensorRow(LAYER + "self_attn.W_pack", "attention_q", query_key_value, _third(0, rotated=True)),
            TensorRow(LAYER + "self_attn.W_pack", "attention_k", query_key_value, _third(1, rotated=True)),
            TensorRow(LAYER + "self_attn.W_pack", "attention_v", query_key_value, _third(2, rotated=False)),
            TensorRow(LAYER + "self_attn.o_proj", "attention_output", attention_output),
            *gated_ffn(),
        ),
        metadata=(*DIMENSIONS, CONTEXT, RMS, *rope.METADATA),
        requirements=(SILU, even_heads, _rotated_by_layers, rope.supported(*_ROPES)),
        defaults={"max_position_embeddings": 4096},
        head=Head.ALWAYS,
    ),
)
