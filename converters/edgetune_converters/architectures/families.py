"""The table itself. Adding a family means adding rows here; nothing else asks which family a model is."""

from __future__ import annotations

from collections.abc import Callable

from edgetune_converters.architectures import rope, slots
from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.architectures.table import Family, Generated, MetadataRow, TensorRow
from edgetune_converters.gguf.values import Value, f32, u32

Shape = Callable[[ModelConfig], tuple[int, ...]]


def _integer(field: str) -> Callable[[ModelConfig], Value | None]:
    return lambda config: u32(config.integer(field))


def _ffn(config: ModelConfig) -> int:
    return config.integer("intermediate_size")


def _window(config: ModelConfig) -> int | None:
    """The sliding window in tokens, where the model uses one. Qwen states a window and whether it is used."""
    used = config.get("use_sliding_window", True)
    window = config.get("sliding_window")
    return window if used and isinstance(window, int) and window > 0 else None


def _context(config: ModelConfig) -> Value:
    """The length over which the runtime agrees with the model: these GGUF forms have no sliding window."""
    return u32(min(config.integer("max_position_embeddings"), _window(config) or 2**31))


def _window_note(config: ModelConfig) -> str | None:
    window, stated = _window(config), config.integer("max_position_embeddings")
    if window is None or window >= stated:
        return None
    return (
        f"llama.cpp has no sliding window for this family: the context length is stated as the window, {window} tokens "
        f"(not {stated}), because up to there both attend to the same tokens"
    )


def _silu(config: ModelConfig) -> str | None:
    act = config.get("hidden_act", "silu")
    return None if act in ("silu", "swish") else f"hidden_act {act!r}: only silu can be carried"


# shapes of weights, (rows, columns)
_embedding: Shape = lambda c: (c.vocab_size, c.hidden)  # noqa: E731
_norm: Shape = lambda c: (c.hidden,)  # noqa: E731
_head_norm: Shape = lambda c: (c.head_dim,)  # noqa: E731
_q: Shape = lambda c: (c.heads * c.head_dim, c.hidden)  # noqa: E731
_kv: Shape = lambda c: (c.kv_heads * c.head_dim, c.hidden)  # noqa: E731
_o: Shape = lambda c: (c.hidden, c.heads * c.head_dim)  # noqa: E731
_up: Shape = lambda c: (_ffn(c), c.hidden)  # noqa: E731
_down: Shape = lambda c: (c.hidden, _ffn(c))  # noqa: E731

_TRUNK = (
    TensorRow("model.embed_tokens", slots.EMBEDDING, _embedding),
    TensorRow("model.norm", "output_norm", _norm),
    TensorRow("lm_head", slots.OUTPUT, _embedding, tied_to="model.embed_tokens"),
    TensorRow("model.layers.{layer}.input_layernorm", "attention_norm", _norm),
    TensorRow("model.layers.{layer}.post_attention_layernorm", "ffn_norm", _norm),
)


def _attention(operation: str, qkv_bias: bool, output_bias: bool) -> tuple[TensorRow, ...]:
    name = "model.layers.{layer}.self_attn."
    return (
        TensorRow(name + "q_proj", "attention_q", _q, operation, qkv_bias),
        TensorRow(name + "k_proj", "attention_k", _kv, operation, qkv_bias),
        TensorRow(name + "v_proj", "attention_v", _kv, bias=qkv_bias),
        TensorRow(name + "o_proj", "attention_output", _o, bias=output_bias),
    )


def _gated_ffn(bias: bool) -> tuple[TensorRow, ...]:
    name = "model.layers.{layer}.mlp."
    return (
        TensorRow(name + "gate_proj", "ffn_gate", _up, bias=bias),
        TensorRow(name + "up_proj", "ffn_up", _up, bias=bias),
        TensorRow(name + "down_proj", "ffn_down", _down, bias=bias),
    )


_HEAD_NORMS = (
    TensorRow("model.layers.{layer}.self_attn.q_norm", "attention_q_norm", _head_norm),
    TensorRow("model.layers.{layer}.self_attn.k_norm", "attention_k_norm", _head_norm),
)

_METADATA: tuple[MetadataRow, ...] = (
    ("block_count", _integer("num_hidden_layers")),
    ("context_length", _context),
    ("embedding_length", _integer("hidden_size")),
    ("feed_forward_length", _integer("intermediate_size")),
    ("attention.head_count", _integer("num_attention_heads")),
    ("attention.head_count_kv", lambda config: u32(config.kv_heads)),
    ("attention.key_length", lambda config: u32(config.head_dim)),
    ("attention.value_length", lambda config: u32(config.head_dim)),
    ("attention.layer_norm_rms_epsilon", lambda config: f32(config.number("rms_norm_eps"))),
    ("vocab_size", _integer("vocab_size")),
    *rope.METADATA,
)

_ROPE_FACTORS = (Generated(slots.ROPE_FACTORS, rope.llama3_factors),)

FAMILIES = (
    Family(
        name="Llama",
        hf=("LlamaForCausalLM",),
        gguf="llama",
        tensors=_TRUNK + _attention("rope_permute", True, True) + _gated_ffn(True),
        metadata=_METADATA,
        generated=_ROPE_FACTORS,
        requirements=(_silu, rope.supported("default", "linear", "yarn", "llama3")),
    ),
    Family(
        name="Mistral",
        hf=("MistralForCausalLM",),
        gguf="llama",
        tensors=_TRUNK + _attention("rope_permute", False, False) + _gated_ffn(False),
        metadata=_METADATA,
        generated=_ROPE_FACTORS,
        requirements=(_silu, rope.supported("default", "linear", "yarn", "llama3")),
        notes=(_window_note,),
    ),
    Family(
        name="Qwen2",
        hf=("Qwen2ForCausalLM",),
        gguf="qwen2",
        tensors=_TRUNK + _attention("copy", True, False) + _gated_ffn(False),
        metadata=_METADATA,
        requirements=(_silu, rope.supported("default", "linear", "yarn")),
        notes=(_window_note,),
    ),
    Family(
        name="Qwen3",
        hf=("Qwen3ForCausalLM",),
        gguf="qwen3",
        tensors=_TRUNK + _attention("copy", True, False) + _HEAD_NORMS + _gated_ffn(False),
        metadata=_METADATA,
        requirements=(_silu, rope.supported("default", "linear", "yarn")),
        notes=(_window_note,),
    ),
)
