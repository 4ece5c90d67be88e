"""MPT: ALiBi, layer norms without biases, fused query, key and value."""

from __future__ import annotations

from edgetune_converters.architectures import slots
from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.architectures.families.common import (
    CLASSIC_METADATA,
    attention_output,
    embedding,
    norm,
    only,
    plain_ffn,
    query_key_value,
)
from edgetune_converters.architectures.table import Family, TensorRow
from edgetune_converters.gguf.values import Value, f32


def _clamp(config: ModelConfig) -> Value | None:
    found = _attention_config(config).get("clip_qkv")
    return None if found is None else f32(_attention_config(config).number("clip_qkv"))


def _attention_config(config: ModelConfig) -> ModelConfig:
    """The settings of the attention, which are an object of their own."""
    return ModelConfig(config.get("attn_config", {}))


def _plain_mpt(config: ModelConfig) -> str | None:
    """Require the MPT that transformers runs, with ALiBi."""
    inner = _attention_config(config)
    checks = (
        only("alibi", True),
        only("qk_ln", False),
        only("prefix_lm", False),
        only("softmax_scale"),
        only("attn_type", "multihead_attention"),
    )
    problems = [text for check in checks if (text := check(inner))]
    return "attn_config: " + "; ".join(problems) if problems else None


_MPT_LAYER = "transformer.blocks.{layer}."

MPT = Family(
    name="MPT",
    hf=("MptForCausalLM", "MPTForCausalLM"),
    gguf="mpt",
    gguf_biases=("attention_qkv", "attention_output", "ffn_up", "ffn_down"),
    tensors=(
        TensorRow("transformer.wte", slots.EMBEDDING, embedding),
        norm("transformer.norm_f", "output_norm"),
        TensorRow("lm_head", slots.OUTPUT, embedding, tied_to="transformer.wte"),
        norm(_MPT_LAYER + "norm_1", "attention_norm"),
        norm(_MPT_LAYER + "norm_2", "ffn_norm"),
        TensorRow(_MPT_LAYER + "attn.Wqkv", "attention_qkv", query_key_value),
        TensorRow(_MPT_LAYER + "attn.out_proj", "attention_output", attention_output),
        *plain_ffn(_MPT_LAYER + "ffn.up_proj", _MPT_LAYER + "ffn.down_proj", bias=False),
    ),
    metadata=(
        *CLASSIC_METADATA,
        ("attention.clamp_kqv", _clamp),
        ("attention.max_alibi_bias", lambda config: f32(_attention_config(config).number("alibi_bias_max", 8.0))),
    ),
    requirements=(_plain_mpt, only("no_bias", True), only("logit_scale"), only("expansion_ratio", 4)),
    defaults={"tie_word_embeddings": True, "layer_norm_eps": 1e-5},
)
