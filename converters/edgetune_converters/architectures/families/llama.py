"""Llama, and Mistral, which is Llama with a sliding window."""

from __future__ import annotations

from edgetune_converters.architectures import rope
from edgetune_converters.architectures.decoder import Traits
from edgetune_converters.architectures.families.common import (
    EVERY_BIAS,
    LLAMA3_ROPES,
    LLAMA_METADATA,
    SILU,
    attention,
    gated_ffn,
    rope_permuted,
    trunk,
    window_everywhere,
    window_note,
)
from edgetune_converters.architectures.table import Family

LLAMA = Family(
    name="Llama",
    hf=("LlamaForCausalLM",),
    gguf="llama",
    tensors=trunk() + attention(rope_permuted, qkv_bias=True, output_bias=True) + gated_ffn(bias=True),
    metadata=LLAMA_METADATA,
    generated=(rope.LLAMA3_FACTORS,),
    requirements=(SILU, LLAMA3_ROPES),
    onnx=Traits(),
)

MISTRAL = Family(
    name="Mistral",
    hf=("MistralForCausalLM",),
    gguf="llama",
    gguf_biases=EVERY_BIAS,
    tensors=trunk() + attention(rope_permuted) + gated_ffn(),
    metadata=LLAMA_METADATA,
    generated=(rope.LLAMA3_FACTORS,),
    requirements=(SILU, LLAMA3_ROPES),
    notes=(window_note,),
    onnx=Traits(window=window_everywhere),
)
