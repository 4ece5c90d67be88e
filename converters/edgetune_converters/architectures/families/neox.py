"""GPT-NeoX and Pythia: fused query, key and value, parallel branches, partial RoPE."""

from __future__ import annotations

from edgetune_converters.architectures import rope, slots
from edgetune_converters.architectures.decoder import Traits
from edgetune_converters.architectures.families.common import (
    CLASSIC_METADATA,
    GELU,
    PARTIAL_YARN_ROPES,
    activation,
    attention_output,
    embedding,
    flag,
    fused_by_head,
    norm,
    only,
    plain_ffn,
    query_key_value,
)
from edgetune_converters.architectures.table import ROTARY_BUFFERS, Family, Head, TensorRow

_NEOX_LAYER = "gpt_neox.layers.{layer}."

NEOX = Family(
    name="GPT-NeoX and Pythia",
    hf=("GPTNeoXForCausalLM",),
    biased=True,
    gguf="gptneox",
    tensors=(
        TensorRow("gpt_neox.embed_in", slots.EMBEDDING, embedding),
        norm("gpt_neox.final_layer_norm", "output_norm", bias=True),
        TensorRow("embed_out", slots.OUTPUT, embedding, tied_to="gpt_neox.embed_in"),
        norm(_NEOX_LAYER + "input_layernorm", "attention_norm", bias=True),
        norm(_NEOX_LAYER + "post_attention_layernorm", "ffn_norm", bias=True),
        TensorRow(_NEOX_LAYER + "attention.query_key_value", "attention_qkv", query_key_value, fused_by_head, True),
        TensorRow(_NEOX_LAYER + "attention.dense", "attention_output", attention_output, bias=True),
        *plain_ffn(_NEOX_LAYER + "mlp.dense_h_to_4h", _NEOX_LAYER + "mlp.dense_4h_to_h"),
    ),
    metadata=(
        *CLASSIC_METADATA,
        *rope.METADATA,
        ("use_parallel_residual", flag("use_parallel_residual", True)),
    ),
    requirements=(GELU, PARTIAL_YARN_ROPES, only("attention_bias", True)),
    defaults={"partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5},
    ignored=(*ROTARY_BUFFERS, r".*\.attention\.(masked_)?bias"),
    head=Head.ALWAYS,
    onnx=Traits(
        norm="layer",
        activation=activation("gelu"),
        parallel=lambda config: bool(config.get("use_parallel_residual", True)),
    ),
)
