"""Phi: 2 with biases and one norm for both branches; 3 and 4 with fused matrices and LongRoPE."""

from __future__ import annotations

from edgetune_converters.architectures import rope, slots
from edgetune_converters.architectures.decoder import Traits
from edgetune_converters.architectures.families.common import (
    CONTEXT,
    CONTEXT_IN_WINDOW,
    DIMENSIONS,
    GELU,
    LAYER,
    LAYER_NORM,
    RMS,
    SILU,
    activation,
    attention,
    attention_output,
    down,
    embedding,
    even_heads,
    gate_up,
    norm,
    only,
    query_key_value,
    trunk,
    up,
    window_everywhere,
    window_note,
)
from edgetune_converters.architectures.table import Family, Head, TensorRow

PHI3 = Family(
    name="Phi-3 and Phi-4",
    hf=("Phi3ForCausalLM",),
    gguf="phi3",
    gguf_biases=("attention_qkv",),
    tensors=(
        *trunk(),
        TensorRow(LAYER + "self_attn.qkv_proj", "attention_qkv", query_key_value),
        TensorRow(LAYER + "self_attn.o_proj", "attention_output", attention_output),
        TensorRow(LAYER + "mlp.gate_up_proj", "ffn_up", gate_up),
        TensorRow(LAYER + "mlp.down_proj", "ffn_down", down),
    ),
    metadata=(*DIMENSIONS, CONTEXT_IN_WINDOW, RMS, *rope.METADATA),
    generated=rope.LONG_FACTORS,
    requirements=(SILU, even_heads, rope.supported("default", *rope.LONGROPE, partial=True)),
    notes=(window_note,),
    onnx=Traits(window=window_everywhere),
)

PHI2 = Family(
    name="Phi-2",
    hf=("PhiForCausalLM",),
    biased=True,
    gguf="phi2",
    tensors=(
        TensorRow("model.embed_tokens", slots.EMBEDDING, embedding),
        norm("model.final_layernorm", "output_norm", bias=True),
        TensorRow("lm_head", slots.OUTPUT, embedding, bias=True, tied_to="model.embed_tokens"),
        norm(LAYER + "input_layernorm", "attention_norm", bias=True),
        *attention(qkv_bias=True, output_bias=True, output="dense"),
        TensorRow(LAYER + "mlp.fc1", "ffn_up", up, bias=True),
        TensorRow(LAYER + "mlp.fc2", "ffn_down", down, bias=True),
    ),
    metadata=(*DIMENSIONS, CONTEXT, LAYER_NORM, *rope.METADATA),
    requirements=(GELU, even_heads, only("qk_layernorm", False), rope.supported("default", partial=True)),
    defaults={"partial_rotary_factor": 0.5},
    head=Head.ALWAYS,
    onnx=Traits(norm="layer", activation=activation("gelu_new"), parallel=lambda config: True),
)
