"""Baichuan 1 and 2: query, key and value in one matrix; RoPE in the 7 B, ALiBi in the 13 B."""

from __future__ import annotations

from edgetune_converters.architectures import rope, slots
from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.architectures.decoder import Traits
from edgetune_converters.architectures.families.common import (
    CONTEXT,
    DIMENSIONS,
    LAYER,
    QKV_BIASES,
    RMS,
    SILU,
    YARN_ROPES,
    attention_output,
    embedding,
    even_heads,
    gated_ffn,
    norm,
    query_key_value,
)
from edgetune_converters.architectures.operations import RopePermute, Take, View
from edgetune_converters.architectures.table import Family, Head, TensorRow, Views

_BAICHUAN2_VOCABULARY = 125_696
_LAYERS_OF_7B, _LAYERS_OF_13B = 32, 40


def _third(part: int, *, rotated: bool) -> Views:
    """Query (0), key (1) or value (2) of a matrix that concatenates them, all of one size."""

    def views(config: ModelConfig) -> tuple[View, ...]:
        take = Take(3 * config.hidden, part * config.hidden, config.hidden)
        return (View((take, RopePermute(config.head_dim)) if rotated and config.layers == _LAYERS_OF_7B else (take,)),)

    return views


def _normalized_head(config: ModelConfig) -> tuple[View, ...]:
    """Baichuan 2, recognized by its vocabulary, divides each row of its head by the row's length."""
    return (View(unit=config.vocab_size == _BAICHUAN2_VOCABULARY),)


def _rotated_by_layers(config: ModelConfig) -> str | None:
    """Require 32 layers (RoPE) or 40 (ALiBi): llama.cpp chooses by their number."""
    if config.layers in (_LAYERS_OF_7B, _LAYERS_OF_13B):
        return None
    return f"{config.layers} layers: only the 7 B of Baichuan, with 32, and the 13 B, with 40, can be exported"


def _only_with_rope(config: ModelConfig) -> str | None:
    """ONNX Runtime's attention has no ALiBi."""
    if config.layers == _LAYERS_OF_7B:
        return None
    return f"{config.layers} layers: only the 7 B of Baichuan can be written as ONNX"


BAICHUAN = Family(
    name="Baichuan",
    hf=("BaichuanForCausalLM", "BaiChuanForCausalLM"),
    gguf="baichuan",
    gguf_biases=QKV_BIASES,
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
    requirements=(SILU, even_heads, _rotated_by_layers, YARN_ROPES),
    defaults={"max_position_embeddings": 4096},
    head=Head.ALWAYS,
    onnx=Traits(refusal=_only_with_rope),
)
