"""GLM-4: four norms per layer, gate and up fused, partial RoPE on neighboring values."""

from __future__ import annotations

from edgetune_converters.architectures import rope
from edgetune_converters.architectures.decoder import Traits
from edgetune_converters.architectures.families.common import (
    CONTEXT,
    DIMENSIONS,
    LAYER,
    PARTIAL_YARN_ROPES,
    RMS,
    SILU,
    attention,
    down,
    gate_up,
    norm,
    trunk,
)
from edgetune_converters.architectures.table import Family, TensorRow

GLM4 = Family(
    name="GLM-4",
    hf=("Glm4ForCausalLM",),
    gguf="glm4",
    tensors=(
        *trunk(ffn_norm=False),
        norm(LAYER + "post_self_attn_layernorm", "attention_post_norm"),
        norm(LAYER + "post_attention_layernorm", "ffn_norm"),
        norm(LAYER + "post_mlp_layernorm", "ffn_post_norm"),
        *attention(qkv_bias=True),
        TensorRow(LAYER + "mlp.gate_up_proj", "ffn_up", gate_up),
        TensorRow(LAYER + "mlp.down_proj", "ffn_down", down),
    ),
    metadata=(*DIMENSIONS, CONTEXT, RMS, *rope.METADATA),
    requirements=(SILU, PARTIAL_YARN_ROPES),
    defaults={"partial_rotary_factor": 0.5},
    onnx=Traits(interleaved=True),
)
