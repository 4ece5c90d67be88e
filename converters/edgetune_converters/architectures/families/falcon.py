"""Falcon: parallel branches under one norm or two, key heads shared by all queries or by groups."""

from __future__ import annotations

from edgetune_converters.architectures import rope, slots
from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.architectures.families.common import (
    BLOCK,
    CLASSIC_METADATA,
    GELU,
    WITHOUT_HEAD,
    attention_output,
    embedding,
    grouped_qkv,
    norm,
    only,
    plain_ffn,
    query_key_value,
)
from edgetune_converters.architectures.table import Family, TensorRow


def _norms_of_falcon(config: ModelConfig) -> int:
    new = bool(config.get("new_decoder_architecture", False))
    return int(config.get("num_ln_in_parallel_attn", 2 if new else 1))


def _grouped_falcon(config: ModelConfig) -> ModelConfig:
    """Return the config with the number of key heads: stated in new models; one, or one per query head, in old ones."""
    if config.get("new_decoder_architecture", False):
        return config
    shared = config.get("multi_query", True)
    return ModelConfig({**config.raw, "num_key_value_heads": 1 if shared else config.heads})


FALCON = Family(
    name="Falcon",
    hf=("FalconForCausalLM", "RWForCausalLM"),
    gguf="falcon",
    tensors=(
        TensorRow("transformer.word_embeddings", slots.EMBEDDING, embedding),
        norm("transformer.ln_f", "output_norm", bias=True),
        TensorRow("lm_head", slots.OUTPUT, embedding, tied_to="transformer.word_embeddings"),
        # one norm for both branches, or one each: then llama.cpp calls that of the attention the second
        norm(BLOCK + "input_layernorm", "attention_norm", bias=True, when=lambda c, layer: _norms_of_falcon(c) == 1),
        norm(BLOCK + "ln_mlp", "attention_norm", bias=True, when=lambda c, layer: _norms_of_falcon(c) == 2),
        norm(BLOCK + "ln_attn", "attention_norm_2", bias=True, when=lambda c, layer: _norms_of_falcon(c) == 2),
        TensorRow(
            BLOCK + "self_attention.query_key_value",
            "attention_qkv",
            lambda c: query_key_value(_grouped_falcon(c)),
            lambda c: grouped_qkv(_grouped_falcon(c)),
        ),
        TensorRow(BLOCK + "self_attention.dense", "attention_output", attention_output),
        *plain_ffn(BLOCK + "mlp.dense_h_to_4h", BLOCK + "mlp.dense_4h_to_h", bias=False),
    ),
    metadata=tuple(
        (key, lambda config, make=make: make(_grouped_falcon(config)))  # type: ignore[misc]
        for key, make in (*CLASSIC_METADATA, *rope.METADATA)
    ),
    requirements=(
        GELU,
        rope.supported("default", "linear"),
        only("alibi", False),
        only("bias", False),
        only("parallel_attn", True),
    ),
    renames=WITHOUT_HEAD,
    implied={"new_decoder_architecture": True},
    defaults={"tie_word_embeddings": True, "max_position_embeddings": 2048, "layer_norm_eps": 1e-5},
)
