"""DeepSeek V2 and V3: multi-head latent attention (MLA), a few dense layers before those with experts."""

from __future__ import annotations

from collections.abc import Callable

from edgetune_converters.architectures import rope
from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.architectures.families.common import (
    CONTEXT,
    DIMENSIONS,
    LAYER,
    RMS,
    SILU,
    flag,
    gated_ffn,
    integer,
    norm,
    only,
    trunk,
)
from edgetune_converters.architectures.families.experts import (
    EXPERT_COUNTS,
    EXPERT_WIDTH,
    expert_rows,
    expert_width,
    router,
)
from edgetune_converters.architectures.operations import Take, View
from edgetune_converters.architectures.table import Family, MetadataRow, TensorRow
from edgetune_converters.gguf.values import Value, f32, u32


def _key_width(config: ModelConfig) -> int:
    """The width of a key: its unrotated and its rotated part."""
    return config.integer("qk_nope_head_dim") + config.integer("qk_rope_head_dim")


def _fused_width(config: ModelConfig) -> int:
    """The width of one head's unrotated key and value, which are fused."""
    return config.integer("qk_nope_head_dim") + config.integer("v_head_dim")


def _key_up(config: ModelConfig) -> tuple[View, ...]:
    """The key part of each head, transposed: llama.cpp applies it to the query instead."""
    return (View(transpose=Take(_fused_width(config), 0, config.integer("qk_nope_head_dim"))),)


def _value_up(config: ModelConfig) -> tuple[View, ...]:
    return (View((Take(_fused_width(config), config.integer("qk_nope_head_dim"), config.integer("v_head_dim")),)),)


def _key_value_up(config: ModelConfig) -> tuple[int, ...]:
    return config.heads * _fused_width(config), config.integer("kv_lora_rank")


def _with_query_rank(config: ModelConfig, layer: int) -> bool:
    return config.get("q_lora_rank") is not None


def _dense(config: ModelConfig, layer: int) -> bool:
    return layer < int(config.get("first_k_dense_replace", 0))


def _sparse(config: ModelConfig, layer: int) -> bool:
    return not _dense(config, layer)


def _shared_width(config: ModelConfig) -> int:
    """The shared experts of a layer are stored as one."""
    return config.integer("n_shared_experts") * expert_width(config)


_ATTENTION = LAYER + "self_attn."
_SHARED_EXPERTS = LAYER + "mlp.shared_experts."
_MLA = (
    TensorRow(
        _ATTENTION + "q_proj",
        "attention_q",
        lambda c: (c.heads * _key_width(c), c.hidden),
        when=lambda c, layer: not _with_query_rank(c, layer),
    ),
    TensorRow(
        _ATTENTION + "q_a_proj", "attention_q_a", lambda c: (c.integer("q_lora_rank"), c.hidden), when=_with_query_rank
    ),
    norm(
        _ATTENTION + "q_a_layernorm",
        "attention_q_a_norm",
        lambda c: (c.integer("q_lora_rank"),),
        when=_with_query_rank,
    ),
    TensorRow(
        _ATTENTION + "q_b_proj",
        "attention_q_b",
        lambda c: (c.heads * _key_width(c), c.integer("q_lora_rank")),
        when=_with_query_rank,
    ),
    TensorRow(
        _ATTENTION + "kv_a_proj_with_mqa",
        "attention_kv_a",
        lambda c: (c.integer("kv_lora_rank") + c.integer("qk_rope_head_dim"), c.hidden),
    ),
    norm(_ATTENTION + "kv_a_layernorm", "attention_kv_a_norm", lambda c: (c.integer("kv_lora_rank"),)),
    TensorRow(
        _ATTENTION + "kv_b_proj",
        "attention_k_b",
        _key_value_up,
        _key_up,
        out=lambda c: (c.heads, c.integer("kv_lora_rank"), c.integer("qk_nope_head_dim")),
    ),
    TensorRow(
        _ATTENTION + "kv_b_proj",
        "attention_v_b",
        _key_value_up,
        _value_up,
        out=lambda c: (c.heads, c.integer("v_head_dim"), c.integer("kv_lora_rank")),
    ),
    TensorRow(_ATTENTION + "o_proj", "attention_output", lambda c: (c.hidden, c.heads * c.integer("v_head_dim"))),
)
_DEEPSEEK = (
    *trunk(),
    *_MLA,
    *gated_ffn(when=_dense),
    TensorRow(LAYER + "mlp.gate", "expert_router", router, when=_sparse),
    *expert_rows(expert_width, when=_sparse),
    TensorRow(_SHARED_EXPERTS + "gate_proj", "shared_gate", lambda c: (_shared_width(c), c.hidden), when=_sparse),
    TensorRow(_SHARED_EXPERTS + "up_proj", "shared_up", lambda c: (_shared_width(c), c.hidden), when=_sparse),
    TensorRow(_SHARED_EXPERTS + "down_proj", "shared_down", lambda c: (c.hidden, _shared_width(c)), when=_sparse),
)


def _maybe(field: str) -> Callable[[ModelConfig], Value | None]:
    return lambda config: None if config.get(field) is None else u32(config.integer(field))


def _groups(field: str) -> Callable[[ModelConfig], Value | None]:
    """Groups of experts, where the choice among groups excludes any."""
    return lambda config: u32(config.integer(field)) if _chooses_groups(config) else None


def _chooses_groups(config: ModelConfig) -> bool:
    return int(config.get("topk_group", 1)) < int(config.get("n_group", 1))


def _log_multiplier(config: ModelConfig) -> Value | None:
    found = config.rope.get("mscale_all_dim")
    return None if found is None else f32(0.1 * float(found))


# metadata that MLA computes differently from families whose heads have one width
_OWN = (
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.scaling.attn_factor",
)
_SOFTMAX, _SIGMOID = 1, 2  # llama_expert_gating_func_type


_DEEPSEEK_METADATA: tuple[MetadataRow, ...] = (
    *((key, make) for key, make in DIMENSIONS if key not in _OWN),
    CONTEXT,
    RMS,
    *((key, make) for key, make in rope.METADATA if key not in _OWN),
    *EXPERT_COUNTS,
    EXPERT_WIDTH,
    # in llama.cpp all heads share one key: the compressed key and the rotated part
    ("attention.head_count_kv", lambda config: u32(1)),
    (
        "attention.key_length",
        lambda config: u32(config.integer("kv_lora_rank") + config.integer("qk_rope_head_dim")),
    ),
    ("attention.value_length", integer("kv_lora_rank")),
    ("attention.key_length_mla", lambda config: u32(_key_width(config))),
    ("attention.value_length_mla", integer("v_head_dim")),
    ("attention.q_lora_rank", _maybe("q_lora_rank")),
    ("attention.kv_lora_rank", integer("kv_lora_rank")),
    ("rope.dimension_count", integer("qk_rope_head_dim")),
    ("rope.scaling.yarn_log_multiplier", _log_multiplier),
    ("leading_dense_block_count", lambda config: u32(int(config.get("first_k_dense_replace", 0)))),
    ("expert_shared_count", integer("n_shared_experts")),
    ("expert_weights_scale", lambda config: f32(config.number("routed_scaling_factor", 1.0))),
)


def _query_rank_by_layers(config: ModelConfig) -> str | None:
    """Require 26 or 27 layers without a query rank: llama.cpp recognizes such a model by them."""
    if (config.get("q_lora_rank") is None) == (config.layers in (26, 27)):
        return None
    return f"q_lora_rank {config.get('q_lora_rank')} with {config.layers} layers: only 26 or 27 layers go without one"


def _one_mscale(config: ModelConfig) -> str | None:
    """Require YaRN's attention scale as in DeepSeek's own models, the only one that llama.cpp has."""
    scales = [config.rope.get(key) for key in ("mscale", "mscale_all_dim")]
    if config.rope["rope_type"] != "yarn":
        return None
    if config.rope.get("attention_factor") is not None:
        return "rope attention_factor: llama.cpp has its own for DeepSeek"
    if scales[0] == scales[1] and scales[0]:
        return None
    return f"mscale {scales[0]} and mscale_all_dim {scales[1]}: only two that are equal can be exported"


_DEEPSEEK_CHECKS = (
    SILU,
    rope.supported("default", "yarn", partial=True),
    _query_rank_by_layers,
    _one_mscale,
    only("attention_bias", False),
    # the norms between the low ranks use this epsilon whatever config.json says
    only("rms_norm_eps", 1e-6),
)

DEEPSEEK_V2 = Family(
    name="DeepSeek-V2",
    hf=("DeepseekV2ForCausalLM",),
    gguf="deepseek2",
    tensors=_DEEPSEEK,
    metadata=(*_DEEPSEEK_METADATA, ("expert_gating_func", lambda config: u32(_SOFTMAX))),
    # llama.cpp rates a group by its two best experts, DeepSeek-V2 by its best; the weights are not normalized
    requirements=(*_DEEPSEEK_CHECKS, only("topk_method", "greedy"), only("norm_topk_prob", False)),
    defaults={"topk_method": "greedy"},
)

DEEPSEEK_V3 = Family(
    name="DeepSeek-V3",
    hf=("DeepseekV3ForCausalLM",),
    gguf="deepseek2",
    tensors=(
        *_DEEPSEEK,
        # a parameter of the router; in llama.cpp, a bias without a weight
        TensorRow(
            LAYER + "mlp.gate",
            "expert_router_offset",
            lambda c: (c.experts,),
            when=_sparse,
            weight=".e_score_correction_bias",
            part="bias",
        ),
    ),
    metadata=(
        *_DEEPSEEK_METADATA,
        ("expert_gating_func", lambda config: u32(_SIGMOID)),
        ("expert_weights_norm", flag("norm_topk_prob", True)),
        ("expert_group_count", _groups("n_group")),
        ("expert_group_used_count", _groups("topk_group")),
    ),
    requirements=(*_DEEPSEEK_CHECKS, only("rope_interleave", True), only("topk_method", "noaux_tc")),
    extra_layers=True,
)
