"""StableLM 2: layer norms, partial RoPE, parallel branches and a norm for each head in some models."""

from __future__ import annotations

from collections.abc import Callable

from edgetune_converters.architectures import rope
from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.architectures.decoder import Traits
from edgetune_converters.architectures.families.common import (
    CONTEXT,
    DIMENSIONS,
    LAYER,
    LAYER_NORM,
    SILU,
    attention,
    even_heads,
    flag,
    gated_ffn,
    head,
    norm,
    trunk,
)
from edgetune_converters.architectures.table import Family, Head, TensorRow


def _sequential(config: ModelConfig, layer: int) -> bool:
    return not config.get("use_parallel_residual", False)


def _stacked_norms(which: str, heads: Callable[[ModelConfig], int]) -> tuple[TensorRow, ...]:
    """A norm for each head, in the models that have them."""
    return (
        norm(
            LAYER + f"self_attn.{which}_layernorm.norms." + "{n}",
            f"attention_{which}_norm",
            head,
            stacked=heads,
            when=lambda config, layer: bool(config.get("qk_layernorm", False)),
        ),
    )


STABLELM2 = Family(
    name="StableLM 2",
    hf=("StableLmForCausalLM",),
    gguf="stablelm",
    tensors=(
        *trunk(bias=True, ffn_norm=False),
        norm(LAYER + "post_attention_layernorm", "ffn_norm", bias=True, when=_sequential),
        *attention(qkv_bias=True),
        *_stacked_norms("q", lambda c: c.heads),
        *_stacked_norms("k", lambda c: c.kv_heads),
        *gated_ffn(),
    ),
    metadata=(
        *DIMENSIONS,
        CONTEXT,
        LAYER_NORM,
        *rope.METADATA,
        ("use_parallel_residual", flag("use_parallel_residual", False)),
    ),
    requirements=(SILU, even_heads, rope.supported("default", partial=True)),
    defaults={"partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5},
    head=Head.ALWAYS,
    onnx=Traits(norm="layer", parallel=lambda config: bool(config.get("use_parallel_residual", False))),
)
