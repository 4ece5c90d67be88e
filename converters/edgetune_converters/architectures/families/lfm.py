"""LFM2: short convolutions in most layers, attention in some."""

from __future__ import annotations

from edgetune_converters.architectures import rope, slots
from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.architectures.families.common import (
    CONTEXT,
    DIMENSIONS,
    LAYER,
    QKV_BIASES,
    RMS,
    attention_output,
    embedding,
    even_heads,
    head,
    integer,
    key_value,
    norm,
    only,
    query,
)
from edgetune_converters.architectures.table import Family, TensorRow
from edgetune_converters.gguf.values import i32s, u32


def _attends(config: ModelConfig, layer: int) -> bool:
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and len(kinds) > layer:
        return bool(kinds[layer] == "full_attention")
    return layer in config.get("full_attn_idxs", [])


def _convolves(config: ModelConfig, layer: int) -> bool:
    return not _attends(config, layer)


def _width(config: ModelConfig) -> int:
    """The feed-forward width; config.json may state it before an adjustment."""
    width, factor = config.ffn, config.get("block_ffn_dim_multiplier")
    if not config.get("block_auto_adjust_ff_dim", True):
        return width
    width = int(2 * width / 3)
    if factor is None:
        return width
    multiple = config.integer("block_multiple_of", 256)
    return multiple * -(-int(factor * width) // multiple)


_ATTENTION = LAYER + "self_attn."
_FEED = LAYER + "feed_forward."

LFM2 = Family(
    name="LFM2",
    hf=("Lfm2ForCausalLM",),
    gguf="lfm2",
    gguf_biases=QKV_BIASES,
    tensors=(
        TensorRow("model.embed_tokens", slots.EMBEDDING, embedding),
        # the final norm, by llama.cpp's name for it
        norm("model.embedding_norm", "embedding_norm"),
        TensorRow("lm_head", slots.OUTPUT, embedding, tied_to="model.embed_tokens"),
        norm(LAYER + "operator_norm", "attention_norm"),
        norm(LAYER + "ffn_norm", "ffn_norm"),
        TensorRow(_ATTENTION + "q_proj", "attention_q", query, when=_attends),
        TensorRow(_ATTENTION + "k_proj", "attention_k", key_value, when=_attends),
        TensorRow(_ATTENTION + "v_proj", "attention_v", key_value, when=_attends),
        TensorRow(_ATTENTION + "out_proj", "attention_output", attention_output, when=_attends),
        norm(_ATTENTION + "q_layernorm", "attention_q_norm", head, when=_attends),
        norm(_ATTENTION + "k_layernorm", "attention_k_norm", head, when=_attends),
        TensorRow(
            LAYER + "conv.conv",
            "convolution",
            lambda c: (c.hidden, 1, c.integer("conv_L_cache")),
            out=lambda c: (c.hidden, c.integer("conv_L_cache")),
            when=_convolves,
        ),
        TensorRow(LAYER + "conv.in_proj", "convolution_in", lambda c: (3 * c.hidden, c.hidden), when=_convolves),
        TensorRow(LAYER + "conv.out_proj", "convolution_out", lambda c: (c.hidden, c.hidden), when=_convolves),
        TensorRow(_FEED + "w1", "ffn_gate", lambda c: (_width(c), c.hidden)),
        TensorRow(_FEED + "w3", "ffn_up", lambda c: (_width(c), c.hidden)),
        TensorRow(_FEED + "w2", "ffn_down", lambda c: (c.hidden, _width(c))),
    ),
    metadata=(
        *((key, make) for key, make in DIMENSIONS if key not in ("feed_forward_length", "attention.head_count_kv")),
        CONTEXT,
        RMS,
        *rope.METADATA,
        ("feed_forward_length", lambda config: u32(_width(config))),
        # a layer without key heads is a convolution
        (
            "attention.head_count_kv",
            lambda config: i32s([config.kv_heads if _attends(config, layer) else 0 for layer in range(config.layers)]),
        ),
        ("shortconv.l_cache", integer("conv_L_cache")),
    ),
    requirements=(even_heads, only("conv_bias", False), rope.supported("default", "linear", "yarn")),
    implied={"block_auto_adjust_ff_dim": False},
    defaults={"tie_word_embeddings": True},
)
