"""BLOOM: ALiBi, a norm after the embedding, fused query, key and value."""

from __future__ import annotations

from edgetune_converters.architectures import slots
from edgetune_converters.architectures.families.common import (
    BLOCK,
    CLASSIC_METADATA,
    WITHOUT_HEAD,
    attention_output,
    embedding,
    fused_by_head,
    norm,
    only,
    plain_ffn,
    query_key_value,
)
from edgetune_converters.architectures.table import Family, TensorRow

BLOOM = Family(
    name="BLOOM",
    hf=("BloomForCausalLM",),
    biased=True,
    gguf="bloom",
    tensors=(
        TensorRow("transformer.word_embeddings", slots.EMBEDDING, embedding),
        norm("transformer.word_embeddings_layernorm", "embedding_norm", bias=True),
        norm("transformer.ln_f", "output_norm", bias=True),
        TensorRow("lm_head", slots.OUTPUT, embedding, tied_to="transformer.word_embeddings"),
        norm(BLOCK + "input_layernorm", "attention_norm", bias=True),
        norm(BLOCK + "post_attention_layernorm", "ffn_norm", bias=True),
        TensorRow(BLOCK + "self_attention.query_key_value", "attention_qkv", query_key_value, fused_by_head, True),
        TensorRow(BLOCK + "self_attention.dense", "attention_output", attention_output, bias=True),
        *plain_ffn(BLOCK + "mlp.dense_h_to_4h", BLOCK + "mlp.dense_4h_to_h"),
    ),
    metadata=CLASSIC_METADATA,
    requirements=(only("apply_residual_connection_post_layernorm", False),),
    renames=WITHOUT_HEAD,
    defaults={"tie_word_embeddings": True, "max_position_embeddings": 2048, "layer_norm_eps": 1e-5},
)
