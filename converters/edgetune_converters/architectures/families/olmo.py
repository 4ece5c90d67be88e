"""OLMo 2 and 3: norms after attention and feed-forward layer, and over all heads of query and key at once."""

from __future__ import annotations

from edgetune_converters.architectures import rope
from edgetune_converters.architectures.decoder import Traits
from edgetune_converters.architectures.families.common import (
    CONTEXT,
    DIMENSIONS,
    LLAMA_METADATA,
    POST_NORMS,
    QKV_BIASES,
    RMS,
    SILU,
    WINDOW,
    YARN_ROPES,
    attention,
    even_heads,
    gated_ffn,
    head_norms,
    local_in_window,
    trunk,
    window_in_sliding_layers,
)
from edgetune_converters.architectures.table import Family, Head

# the norms of query and key cover all heads at once
_OLMO = (
    *trunk(attention_norm=False, ffn_norm=False),
    *POST_NORMS,
    *attention(),
    *head_norms(q=lambda c: (c.heads * c.head_dim,), k=lambda c: (c.kv_heads * c.head_dim,)),
    *gated_ffn(),
)

OLMO2 = Family(
    name="OLMo 2",
    hf=("Olmo2ForCausalLM",),
    gguf="olmo2",
    gguf_biases=QKV_BIASES,
    tensors=_OLMO,
    metadata=LLAMA_METADATA,
    requirements=(SILU, even_heads, YARN_ROPES),
    head=Head.ALWAYS,
    onnx=Traits(),
)

OLMO3 = Family(
    name="OLMo 3",
    hf=("Olmo3ForCausalLM",),
    gguf="olmo2",
    gguf_biases=QKV_BIASES,
    tensors=_OLMO,
    metadata=(*DIMENSIONS, CONTEXT, RMS, *rope.METADATA, *WINDOW),
    requirements=(SILU, even_heads, YARN_ROPES, rope.local_unscaled, rope.one_theta),
    defaults={"sliding_window": 4096, "sliding_window_pattern": 4, "rope_theta": 500_000.0},
    head=Head.ALWAYS,
    onnx=Traits(window=window_in_sliding_layers, rotation=local_in_window),
)
