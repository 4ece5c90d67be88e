"""GPT-2: learned positions, layer norms with biases, matrices stored transposed."""

from __future__ import annotations

from edgetune_converters.architectures import slots
from edgetune_converters.architectures.decoder import Traits
from edgetune_converters.architectures.families.common import (
    BLOCK,
    CLASSIC_METADATA,
    GELU,
    WITHOUT_HEAD,
    activation,
    attention_output,
    down,
    embedding,
    norm,
    only,
    query_key_value,
    transposed,
    up,
)
from edgetune_converters.architectures.operations import Take, View
from edgetune_converters.architectures.table import ROTARY_BUFFERS, Family, Shape, TensorRow, Views


def _transposed(shape: Shape) -> tuple[Shape, Views]:
    """The shape in the checkpoint, and the view, of a matrix that the checkpoint stores transposed."""
    stored = transposed(shape)
    return stored, lambda c: (View(transpose=Take(stored(c)[0], 0, stored(c)[0])),)


GPT2 = Family(
    name="GPT-2",
    hf=("GPT2LMHeadModel",),
    biased=True,
    gguf="gpt2",
    tensors=(
        TensorRow("transformer.wte", slots.EMBEDDING, embedding),
        TensorRow("transformer.wpe", "position_embedding", lambda c: (c.integer("max_position_embeddings"), c.hidden)),
        norm("transformer.ln_f", "output_norm", bias=True),
        TensorRow("lm_head", slots.OUTPUT, embedding, tied_to="transformer.wte"),
        norm(BLOCK + "ln_1", "attention_norm", bias=True),
        norm(BLOCK + "ln_2", "ffn_norm", bias=True),
        TensorRow(BLOCK + "attn.c_attn", "attention_qkv", *_transposed(query_key_value), bias=True),
        TensorRow(BLOCK + "attn.c_proj", "attention_output", *_transposed(attention_output), bias=True),
        TensorRow(BLOCK + "mlp.c_fc", "ffn_up", *_transposed(up), bias=True),
        TensorRow(BLOCK + "mlp.c_proj", "ffn_down", *_transposed(down), bias=True),
    ),
    metadata=CLASSIC_METADATA,
    requirements=(
        GELU,
        only("scale_attn_weights", True),
        only("scale_attn_by_inverse_layer_idx", False),
        only("add_cross_attention", False),
    ),
    renames=WITHOUT_HEAD,
    defaults={"tie_word_embeddings": True},
    ignored=(*ROTARY_BUFFERS, r".*\.attn\.(masked_)?bias"),
    onnx=Traits(norm="layer", activation=activation("gelu_new"), rotation=lambda config, layer: None),
)
