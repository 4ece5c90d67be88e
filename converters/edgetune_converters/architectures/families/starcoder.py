"""StarCoder 2: layer norms and biases throughout, a feed-forward layer without a gate."""

from __future__ import annotations

from edgetune_converters.architectures import rope
from edgetune_converters.architectures.decoder import Traits
from edgetune_converters.architectures.families.common import (
    CONTEXT_IN_WINDOW,
    DIMENSIONS,
    GELU,
    LAYER,
    LAYER_NORM,
    YARN_ROPES,
    activation,
    attention,
    even_heads,
    only,
    plain_ffn,
    trunk,
    window_everywhere,
    window_note,
)
from edgetune_converters.architectures.table import Family

STARCODER2 = Family(
    name="StarCoder 2",
    hf=("Starcoder2ForCausalLM",),
    biased=True,
    gguf="starcoder2",
    tensors=(
        *trunk(bias=True),
        *attention(qkv_bias=True, output_bias=True),
        *plain_ffn(LAYER + "mlp.c_fc", LAYER + "mlp.c_proj"),
    ),
    metadata=(*DIMENSIONS, CONTEXT_IN_WINDOW, LAYER_NORM, *rope.METADATA),
    requirements=(GELU, even_heads, YARN_ROPES, only("use_bias", True)),
    notes=(window_note,),
    defaults={"tie_word_embeddings": True},
    onnx=Traits(norm="layer", activation=activation("gelu_pytorch_tanh"), window=window_everywhere),
)
