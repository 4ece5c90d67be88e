"""InternLM2: Llama with query, key and value in one matrix, group by group."""

from __future__ import annotations

from edgetune_converters.architectures import rope, slots
from edgetune_converters.architectures.decoder import Traits
from edgetune_converters.architectures.families.common import (
    LAYER,
    LLAMA_METADATA,
    QKV_BIASES,
    SILU,
    attention_output,
    down,
    embedding,
    even_heads,
    norm,
    only,
    qkv_groups,
    query_key_value,
    up,
)
from edgetune_converters.architectures.operations import RopePermute, View
from edgetune_converters.architectures.table import Family, Head, TensorRow, Views


def _grouped(part: int, *, rotated: bool) -> Views:
    """Query (0), key (1) or value (2), from groups of the query heads of one key head, that key and its value."""
    return lambda c: (View((qkv_groups(c)[part], *((RopePermute(c.head_dim),) if rotated else ()))),)


_QKV = LAYER + "attention.wqkv"

INTERNLM2 = Family(
    name="InternLM2",
    hf=("InternLM2ForCausalLM",),
    gguf="internlm2",
    gguf_biases=QKV_BIASES,
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
    requirements=(SILU, even_heads, rope.supported("default", "linear", "yarn"), only("bias", False)),
    head=Head.ALWAYS,
    onnx=Traits(),
)
