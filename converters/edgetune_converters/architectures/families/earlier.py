"""Families older than Llama or beside it: layer norms with biases, fused matrices, ALiBi, parallel branches."""

from __future__ import annotations

from edgetune_converters.architectures import rope, slots
from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.architectures.families.common import (
    CONTEXT,
    CONTEXT_IN_WINDOW,
    DIMENSIONS,
    GELU,
    LAYER,
    LAYER_NORM,
    RMS,
    SILU,
    WINDOW,
    attention,
    attention_output,
    down,
    embedding,
    even_heads,
    flag,
    gate_up,
    gated_ffn,
    grouped_qkv,
    norm,
    number,
    only,
    query_key_value,
    transposed,
    trunk,
    up,
    window_note,
)
from edgetune_converters.architectures.operations import Take, View
from edgetune_converters.architectures.table import Family, Head, Shape, TensorRow, Views
from edgetune_converters.gguf.values import Value, f32

_CLASSIC = (*DIMENSIONS, CONTEXT, LAYER_NORM)
_ROPE = rope.supported("default", "linear", "yarn")
_PARTIAL_ROPE = rope.supported("default", "linear", "yarn", partial=True)
_BLOCK = "transformer.h.{layer}."
# checkpoints on the hub were saved from the model without its head, whose names begin one level lower
_WITHOUT_HEAD = ((r"^(h\.\d+|wte|wpe|ln_f|word_embeddings|word_embeddings_layernorm)\.", r"transformer.\1."),)


def _turned(shape: Shape) -> tuple[Shape, Views]:
    """Shape in the checkpoint and view of a matrix that it stores transposed, of the shape that the runtime wants."""
    stored = transposed(shape)
    return stored, lambda c: (View(transpose=Take(stored(c)[0], 0, stored(c)[0])),)


def _in_threes(config: ModelConfig) -> tuple[View, ...]:
    """Query, key and value below one another, from the three of each head in turn."""
    width = config.head_dim
    return tuple(View((Take(3 * width, part * width, width),)) for part in range(3))


def _wide_mlp(first: str, second: str, *, bias: bool = True) -> tuple[TensorRow, ...]:
    """A feed-forward layer without a gate."""
    return (TensorRow(first, "ffn_up", up, bias=bias), TensorRow(second, "ffn_down", down, bias=bias))


# -- GPT-2, GPT-NeoX, BLOOM, Falcon, MPT -------------------------------------------------------------------------------

_GPT2 = Family(
    name="GPT-2",
    hf=("GPT2LMHeadModel",),
    gguf="gpt2",
    tensors=(
        TensorRow("transformer.wte", slots.EMBEDDING, embedding),
        TensorRow("transformer.wpe", "position_embedding", lambda c: (c.integer("max_position_embeddings"), c.hidden)),
        norm("transformer.ln_f", "output_norm", bias=True),
        TensorRow("lm_head", slots.OUTPUT, embedding, tied_to="transformer.wte"),
        norm(_BLOCK + "ln_1", "attention_norm", bias=True),
        norm(_BLOCK + "ln_2", "ffn_norm", bias=True),
        TensorRow(_BLOCK + "attn.c_attn", "attention_qkv", *_turned(query_key_value), bias=True),
        TensorRow(_BLOCK + "attn.c_proj", "attention_output", *_turned(attention_output), bias=True),
        TensorRow(_BLOCK + "mlp.c_fc", "ffn_up", *_turned(up), bias=True),
        TensorRow(_BLOCK + "mlp.c_proj", "ffn_down", *_turned(down), bias=True),
    ),
    metadata=_CLASSIC,
    requirements=(
        GELU,
        only("scale_attn_weights", True),
        only("scale_attn_by_inverse_layer_idx", False),
        only("add_cross_attention", False),
    ),
    renames=_WITHOUT_HEAD,
    defaults={"tie_word_embeddings": True},
    ignored=(r".*\.attn\.(masked_)?bias",),
)

_NEOX_LAYER = "gpt_neox.layers.{layer}."
_NEOX = Family(
    name="GPT-NeoX and Pythia",
    hf=("GPTNeoXForCausalLM",),
    gguf="gptneox",
    tensors=(
        TensorRow("gpt_neox.embed_in", slots.EMBEDDING, embedding),
        norm("gpt_neox.final_layer_norm", "output_norm", bias=True),
        TensorRow("embed_out", slots.OUTPUT, embedding, tied_to="gpt_neox.embed_in"),
        norm(_NEOX_LAYER + "input_layernorm", "attention_norm", bias=True),
        norm(_NEOX_LAYER + "post_attention_layernorm", "ffn_norm", bias=True),
        TensorRow(_NEOX_LAYER + "attention.query_key_value", "attention_qkv", query_key_value, _in_threes, True),
        TensorRow(_NEOX_LAYER + "attention.dense", "attention_output", attention_output, bias=True),
        *_wide_mlp(_NEOX_LAYER + "mlp.dense_h_to_4h", _NEOX_LAYER + "mlp.dense_4h_to_h"),
    ),
    metadata=(
        *_CLASSIC,
        *rope.METADATA,
        ("use_parallel_residual", flag("use_parallel_residual", True)),
    ),
    requirements=(GELU, _PARTIAL_ROPE, only("attention_bias", True)),
    defaults={"partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5},
    ignored=(r".*\.attention\.(masked_)?bias", r".*\.rotary_emb\.inv_freq"),
    head=Head.ALWAYS,
)

_BLOOM = Family(
    name="BLOOM",
    hf=("BloomForCausalLM",),
    gguf="bloom",
    tensors=(
        TensorRow("transformer.word_embeddings", slots.EMBEDDING, embedding),
        norm("transformer.word_embeddings_layernorm", "embedding_norm", bias=True),
        norm("transformer.ln_f", "output_norm", bias=True),
        TensorRow("lm_head", slots.OUTPUT, embedding, tied_to="transformer.word_embeddings"),
        norm(_BLOCK + "input_layernorm", "attention_norm", bias=True),
        norm(_BLOCK + "post_attention_layernorm", "ffn_norm", bias=True),
        TensorRow(_BLOCK + "self_attention.query_key_value", "attention_qkv", query_key_value, _in_threes, True),
        TensorRow(_BLOCK + "self_attention.dense", "attention_output", attention_output, bias=True),
        *_wide_mlp(_BLOCK + "mlp.dense_h_to_4h", _BLOCK + "mlp.dense_4h_to_h"),
    ),
    metadata=_CLASSIC,
    requirements=(only("apply_residual_connection_post_layernorm", False),),
    renames=_WITHOUT_HEAD,
    defaults={"tie_word_embeddings": True, "max_position_embeddings": 2048, "layer_norm_eps": 1e-5},
)

_FALCON = Family(
    name="Falcon",
    hf=("FalconForCausalLM", "RWForCausalLM"),
    gguf="falcon",
    tensors=(
        TensorRow("transformer.word_embeddings", slots.EMBEDDING, embedding),
        norm("transformer.ln_f", "output_norm", bias=True),
        TensorRow("lm_head", slots.OUTPUT, embedding, tied_to="transformer.word_embeddings"),
        # one norm for both branches, or one for each: then that of the attention is the second to llama.cpp
        norm(_BLOCK + "input_layernorm", "attention_norm", bias=True, when=lambda c, layer: _norms_of_falcon(c) == 1),
        norm(_BLOCK + "ln_mlp", "attention_norm", bias=True, when=lambda c, layer: _norms_of_falcon(c) == 2),
        norm(_BLOCK + "ln_attn", "attention_norm_2", bias=True, when=lambda c, layer: _norms_of_falcon(c) == 2),
        TensorRow(
            _BLOCK + "self_attention.query_key_value",
            "attention_qkv",
            lambda c: query_key_value(_grouped_falcon(c)),
            lambda c: grouped_qkv(_grouped_falcon(c)),
        ),
        TensorRow(_BLOCK + "self_attention.dense", "attention_output", attention_output),
        *_wide_mlp(_BLOCK + "mlp.dense_h_to_4h", _BLOCK + "mlp.dense_4h_to_h", bias=False),
    ),
    metadata=tuple(
        (key, lambda config, make=make: make(_grouped_falcon(config)))  # type: ignore[misc]
        for key, make in (*_CLASSIC, *rope.METADATA)
    ),
    requirements=(
        GELU,
        rope.supported("default", "linear"),
        only("alibi", False),
        only("bias", False),
        only("parallel_attn", True),
    ),
    renames=_WITHOUT_HEAD,
    defaults={"tie_word_embeddings": True, "max_position_embeddings": 2048, "layer_norm_eps": 1e-5},
)


def _norms_of_falcon(config: ModelConfig) -> int:
    new = bool(config.get("new_decoder_architecture", False))
    return int(config.get("num_ln_in_parallel_attn", 2 if new else 1))


def _grouped_falcon(config: ModelConfig) -> ModelConfig:
    """With the number of key heads that counts: stated in new models, one or as many as query heads in the first."""
    if config.get("new_decoder_architecture", False):
        return config
    shared = config.get("multi_query", True)
    return ModelConfig({**config.raw, "num_key_value_heads": 1 if shared else config.heads})


def _clamp(config: ModelConfig) -> Value | None:
    found = _attention_config(config).get("clip_qkv")
    return None if found is None else f32(_attention_config(config).number("clip_qkv"))


def _attention_config(config: ModelConfig) -> ModelConfig:
    """The settings of MPT's attention, which are an object of their own."""
    return ModelConfig(config.get("attn_config", {}))


def _plain_mpt(config: ModelConfig) -> str | None:
    """A requirement: what transformers runs of MPT, with ALiBi."""
    inner = _attention_config(config)
    checks = (
        only("alibi", True),
        only("qk_ln", False),
        only("prefix_lm", False),
        only("softmax_scale"),
        only("attn_type", "multihead_attention"),
    )
    problems = [text for check in checks if (text := check(inner))]
    return "attn_config: " + "; ".join(problems) if problems else None


_MPT_LAYER = "transformer.blocks.{layer}."
_MPT = Family(
    name="MPT",
    hf=("MptForCausalLM", "MPTForCausalLM"),
    gguf="mpt",
    tensors=(
        TensorRow("transformer.wte", slots.EMBEDDING, embedding),
        norm("transformer.norm_f", "output_norm"),
        TensorRow("lm_head", slots.OUTPUT, embedding, tied_to="transformer.wte"),
        norm(_MPT_LAYER + "norm_1", "attention_norm"),
        norm(_MPT_LAYER + "norm_2", "ffn_norm"),
        TensorRow(_MPT_LAYER + "attn.Wqkv", "attention_qkv", query_key_value),
        TensorRow(_MPT_LAYER + "attn.out_proj", "attention_output", attention_output),
        *_wide_mlp(_MPT_LAYER + "ffn.up_proj", _MPT_LAYER + "ffn.down_proj", bias=False),
    ),
    metadata=(
        *_CLASSIC,
        ("attention.clamp_kqv", _clamp),
        ("attention.max_alibi_bias", lambda config: f32(_attention_config(config).number("alibi_bias_max", 8.0))),
    ),
    requirements=(_plain_mpt, only("no_bias", True), only("logit_scale"), only("expansion_ratio", 4)),
    defaults={"tie_word_embeddings": True, "layer_norm_eps": 1e-5},
)

# -- StarCoder 2, GLM-4, Command-R -------------------------------------------------------------------------------------

_STARCODER = Family(
    name="StarCoder 2",
    hf=("Starcoder2ForCausalLM",),
    gguf="starcoder2",
    tensors=(
        *trunk(bias=True),
        *attention(qkv_bias=True, output_bias=True),
        *_wide_mlp(LAYER + "mlp.c_fc", LAYER + "mlp.c_proj"),
    ),
    metadata=(*DIMENSIONS, CONTEXT_IN_WINDOW, LAYER_NORM, *rope.METADATA),
    requirements=(GELU, even_heads, _ROPE, only("use_bias", True)),
    notes=(window_note,),
    defaults={"tie_word_embeddings": True},
)

_GLM = Family(
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
    requirements=(SILU, _PARTIAL_ROPE),
    defaults={"partial_rotary_factor": 0.5},
)


def _norms_in_64_layers(config: ModelConfig) -> str | None:
    """A requirement: llama.cpp looks for norms of Command-R's heads from 64 layers on, and always then."""
    found = bool(config.get("use_qk_norm", False))
    if found == (config.layers >= 64):
        return None
    return f"use_qk_norm {found} with {config.layers} layers: llama.cpp has such norms from 64 on, and always then"


def _head_norm(which: str, shape: Shape) -> TensorRow:
    name = LAYER + f"self_attn.{which}_norm"
    return norm(name, f"attention_{which}_norm", shape, when=lambda c, layer: bool(c.get("use_qk_norm", False)))


# one norm for both branches
_COHERE = (*trunk(ffn_norm=False), *attention(), *gated_ffn())
_COHERE_METADATA = (*_CLASSIC, *rope.METADATA, ("logit_scale", number("logit_scale")))
_COMMAND = Family(
    name="Command-R",
    hf=("CohereForCausalLM",),
    gguf="command-r",
    tensors=(
        *_COHERE,
        _head_norm("q", lambda c: (c.heads, c.head_dim)),
        _head_norm("k", lambda c: (c.kv_heads, c.head_dim)),
    ),
    metadata=_COHERE_METADATA,
    requirements=(SILU, even_heads, _ROPE, only("attention_bias", False), _norms_in_64_layers),
    defaults={"tie_word_embeddings": True, "logit_scale": 0.0625},
    head=Head.NEVER,
)
_COMMAND_7B = Family(
    name="Command-R7B",
    hf=("Cohere2ForCausalLM",),
    gguf="cohere2",
    tensors=_COHERE,
    metadata=(*_COHERE_METADATA, *WINDOW),
    requirements=(SILU, even_heads, rope.supported("default"), only("attention_bias", False)),
    defaults={
        "tie_word_embeddings": True,
        "logit_scale": 0.0625,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    },
    head=Head.NEVER,
)

FAMILIES = (_GPT2, _NEOX, _BLOOM, _FALCON, _MPT, _STARCODER, _GLM, _COMMAND, _COMMAND_7B)
