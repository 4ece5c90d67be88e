"""What many families share: shapes, views, rows, metadata, requirements and decoder traits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgetune_converters.architectures import rope, slots
from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.architectures.decoder import NumberOf
from edgetune_converters.architectures.operations import RopePermute, Take, View
from edgetune_converters.architectures.table import MetadataRow, Requirement, Shape, TensorRow, Views, When, copied
from edgetune_converters.gguf.values import Value, boolean, booleans, f32, u32

LAYER = "model.layers.{layer}."
BLOCK = "transformer.h.{layer}."
# checkpoints saved from the model without its head lack the first level of the names
WITHOUT_HEAD = ((r"^(h\.\d+|wte|wpe|ln_f|word_embeddings|word_embeddings_layernorm)\.", r"transformer.\1."),)

# -- shapes of weights, (rows, columns) --------------------------------------------------------------------------------


def embedding(config: ModelConfig) -> tuple[int, ...]:
    """The shape of the embedding and of the head."""
    return config.vocab_size, config.hidden


def hidden(config: ModelConfig) -> tuple[int, ...]:
    """The shape of a norm over the residual stream."""
    return (config.hidden,)


def head(config: ModelConfig) -> tuple[int, ...]:
    """The shape of a norm over a head."""
    return (config.head_dim,)


def query(config: ModelConfig) -> tuple[int, ...]:
    """The shape of the query matrix."""
    return config.heads * config.head_dim, config.hidden


def key_value(config: ModelConfig) -> tuple[int, ...]:
    """The shape of the key matrix and of the value matrix."""
    return config.kv_heads * config.head_dim, config.hidden


def query_key_value(config: ModelConfig) -> tuple[int, ...]:
    """The shape of query, key and value in one matrix."""
    return (config.heads + 2 * config.kv_heads) * config.head_dim, config.hidden


def attention_output(config: ModelConfig) -> tuple[int, ...]:
    """The shape of the output matrix of the attention."""
    return config.hidden, config.heads * config.head_dim


def up(config: ModelConfig) -> tuple[int, ...]:
    """The shape of the up (or gate) matrix of the feed-forward layer."""
    return config.ffn, config.hidden


def gate_up(config: ModelConfig) -> tuple[int, ...]:
    """The shape of gate and up in one matrix."""
    return 2 * config.ffn, config.hidden


def down(config: ModelConfig) -> tuple[int, ...]:
    """The shape of the down matrix of the feed-forward layer."""
    return config.hidden, config.ffn


def transposed(shape: Shape) -> Shape:
    """Return the shape of a matrix that a checkpoint stores transposed."""
    return lambda config: (*shape(config)[:-2], *reversed(shape(config)[-2:]))


# -- views -------------------------------------------------------------------------------------------------------------


def rope_permuted(config: ModelConfig) -> tuple[View, ...]:
    """Heads whose rotated pairs become neighbors, see RopePermute."""
    return (View((RopePermute(config.head_dim),)),)


def plus_one(config: ModelConfig) -> tuple[View, ...]:
    """A norm that is stored as its difference from one."""
    return (View(add=1.0),)


def grouped_qkv(config: ModelConfig) -> tuple[View, ...]:
    """Query, key and value, from groups of the query heads of one key head, that key and its value."""
    return tuple(View((take,)) for take in qkv_groups(config))


def qkv_groups(config: ModelConfig) -> tuple[Take, Take, Take]:
    """Return the three parts of a matrix that is fused group by group, see `grouped_qkv`."""
    width, queries = config.head_dim, config.heads // config.kv_heads
    size = (queries + 2) * width
    return Take(size, 0, queries * width), Take(size, queries * width, width), Take(size, size - width, width)


def fused_by_head(config: ModelConfig) -> tuple[View, ...]:
    """Query, key and value, from a matrix that fuses the three head by head."""
    width = config.head_dim
    return tuple(View((Take(3 * width, part * width, width),)) for part in range(3))


# -- rows --------------------------------------------------------------------------------------------------------------


def norm(module: str, slot: str, shape: Shape = hidden, **options: Any) -> TensorRow:
    """Return the row of a norm."""
    return TensorRow(module, slot, shape, **options)


def trunk(
    *, bias: bool = False, norms: Views = copied, attention_norm: bool = True, ffn_norm: bool = True
) -> tuple[TensorRow, ...]:
    """Return embedding, head and norms as in Llama. `norms` is the view of the norms, `bias` whether they have one."""
    inner = (
        (attention_norm, norm(LAYER + "input_layernorm", "attention_norm", bias=bias, views=norms)),
        (ffn_norm, norm(LAYER + "post_attention_layernorm", "ffn_norm", bias=bias, views=norms)),
    )
    return (
        TensorRow("model.embed_tokens", slots.EMBEDDING, embedding),
        norm("model.norm", "output_norm", bias=bias, views=norms),
        TensorRow("lm_head", slots.OUTPUT, embedding, tied_to="model.embed_tokens"),
        *(row for wanted, row in inner if wanted),
    )


def attention(
    views: Views = copied, *, qkv_bias: bool = False, output_bias: bool = False, output: str = "o_proj"
) -> tuple[TensorRow, ...]:
    """Return separate matrices as in Llama. `views` applies to query and key."""
    name = LAYER + "self_attn."
    return (
        TensorRow(name + "q_proj", "attention_q", query, views, qkv_bias),
        TensorRow(name + "k_proj", "attention_k", key_value, views, qkv_bias),
        TensorRow(name + "v_proj", "attention_v", key_value, bias=qkv_bias),
        TensorRow(name + output, "attention_output", attention_output, bias=output_bias),
    )


def head_norms(views: Views = copied, **shapes: Shape) -> tuple[TensorRow, ...]:
    """Return the norms of query and key."""
    name = LAYER + "self_attn."
    return (
        norm(name + "q_norm", "attention_q_norm", shapes.get("q", head), views=views),
        norm(name + "k_norm", "attention_k_norm", shapes.get("k", head), views=views),
    )


def gated_ffn(*, bias: bool = False, when: When | None = None, name: str = "mlp.") -> tuple[TensorRow, ...]:
    """Return gate, up and down as in Llama."""
    options: dict[str, Any] = {"bias": bias} | ({"when": when} if when else {})
    return (
        TensorRow(LAYER + name + "gate_proj", "ffn_gate", up, **options),
        TensorRow(LAYER + name + "up_proj", "ffn_up", up, **options),
        TensorRow(LAYER + name + "down_proj", "ffn_down", down, **options),
    )


def plain_ffn(first: str, second: str, *, bias: bool = True) -> tuple[TensorRow, ...]:
    """Return a feed-forward layer without a gate."""
    return (TensorRow(first, "ffn_up", up, bias=bias), TensorRow(second, "ffn_down", down, bias=bias))


POST_NORMS = (
    norm(LAYER + "post_attention_layernorm", "attention_post_norm"),
    norm(LAYER + "post_feedforward_layernorm", "ffn_post_norm"),
)


QKV_BIASES = ("attention_q", "attention_k", "attention_v")
"""The slots of which every architecture of llama.cpp with separate matrices reads a bias where there is one."""
ATTENTION_BIASES = (*QKV_BIASES, "attention_output")
EVERY_BIAS = (*ATTENTION_BIASES, "ffn_gate", "ffn_up", "ffn_down")


# -- metadata ----------------------------------------------------------------------------------------------------------


def integer(field: str) -> Callable[[ModelConfig], Value | None]:
    """Return a field of config.json as an unsigned integer."""
    return lambda config: u32(config.integer(field))


def number(field: str) -> Callable[[ModelConfig], Value | None]:
    """Return a field of config.json as a float."""
    return lambda config: f32(config.number(field))


def flag(field: str, default: bool) -> Callable[[ModelConfig], Value | None]:
    """Return a field of config.json as a boolean."""
    return lambda config: boolean(bool(config.get(field, default)))


def window(config: ModelConfig) -> int | None:
    """Return the sliding window in tokens, None without one. Qwen states a window and whether it is used."""
    used = config.get("use_sliding_window", True)
    found = config.get("sliding_window")
    return found if used and isinstance(found, int) and found > 0 else None


def _context_in_window(config: ModelConfig) -> Value:
    """The context up to which runtime and model agree, where a GGUF architecture has no sliding window."""
    return u32(min(config.context, window(config) or 2**31))


def window_note(config: ModelConfig) -> str | None:
    """Note that the sliding window cannot be represented, where there is one."""
    found, stated = window(config), config.context
    if found is None or found >= stated:
        return None
    return (
        f"llama.cpp has no sliding window for this family: the context length is stated as the window, {found} tokens "
        f"(not {stated}), because up to there both attend to the same tokens"
    )


CONTEXT: MetadataRow = ("context_length", lambda config: u32(config.context))
CONTEXT_IN_WINDOW: MetadataRow = ("context_length", _context_in_window)
DIMENSIONS: tuple[MetadataRow, ...] = (
    ("block_count", integer("num_hidden_layers")),
    ("embedding_length", integer("hidden_size")),
    ("feed_forward_length", lambda config: u32(config.ffn)),
    ("attention.head_count", integer("num_attention_heads")),
    ("attention.head_count_kv", lambda config: u32(config.kv_heads)),
    ("attention.key_length", lambda config: u32(config.head_dim)),
    ("attention.value_length", lambda config: u32(config.head_dim)),
    ("vocab_size", integer("vocab_size")),
)
RMS: MetadataRow = ("attention.layer_norm_rms_epsilon", number("rms_norm_eps"))
LAYER_NORM: MetadataRow = ("attention.layer_norm_epsilon", number("layer_norm_eps"))
# families with a window in some layers: its width and the layers
WINDOW: tuple[MetadataRow, ...] = (
    ("attention.sliding_window", integer("sliding_window")),
    (
        "attention.sliding_window_pattern",
        lambda config: booleans([config.slides(layer) for layer in range(config.layers)]),
    ),
)
CLASSIC_METADATA = (*DIMENSIONS, CONTEXT, LAYER_NORM)
LLAMA_METADATA = (*DIMENSIONS, CONTEXT_IN_WINDOW, RMS, *rope.METADATA)


# -- requirements ------------------------------------------------------------------------------------------------------


def only(field: str, *values: Any) -> Requirement:
    """Require one of `values`, or an absent field: llama.cpp runs nothing else."""

    def check(config: ModelConfig) -> str | None:
        found = config.get(field)
        if found is None or found in values:
            return None
        return f"{field} {found!r}: only {' or '.join(repr(value) for value in values)} can be exported"

    return check


YARN_ROPES = rope.supported("default", "linear", "yarn")
PARTIAL_YARN_ROPES = rope.supported("default", "linear", "yarn", partial=True)
LLAMA3_ROPES = rope.supported("default", "linear", "yarn", "llama3")
SILU = only("hidden_act", "silu", "swish")
# llama.cpp has one GELU, the tanh approximation in a table; the exact GELU differs by less than 1e-3
GELU = only("hidden_act", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")
CAUSAL = only("use_bidirectional_attention", False)


def even_heads(config: ModelConfig) -> str | None:
    """Require heads that divide the hidden size evenly, the only width that llama.cpp has for this family."""
    if config.heads * config.head_dim == config.hidden:
        return None
    return f"{config.heads} heads of {config.head_dim} for a hidden size of {config.hidden}: only equal can be exported"


# -- traits of the decoder, for ONNX -----------------------------------------------------------------------------------


def stated(field: str) -> NumberOf:
    """Return a number that config.json must have."""
    return lambda config: config.number(field)


def activation(default: str) -> Callable[[ModelConfig], Any]:
    """Return the activation of config.json, or a default of the family."""
    return lambda config: config.get("hidden_act", default)


def window_everywhere(config: ModelConfig, layer: int) -> int | None:
    """Return the window of a layer: in all layers, or in those that `layer_types` names where it is stated."""
    return window(config) if config.get("layer_types") is None or config.slides(layer) else None


def window_in_later_layers(config: ModelConfig, layer: int) -> int | None:
    """Return the window of a layer: by `layer_types`, or from layer `max_window_layers` on.

    There is one only where `use_sliding_window` is set, as in Qwen.
    """
    if not config.get("use_sliding_window", False):
        return None
    kinds = config.get("layer_types")
    slides = config.slides(layer) if kinds else layer >= config.get("max_window_layers", config.layers)
    return window(config) if slides else None


def window_in_sliding_layers(config: ModelConfig, layer: int) -> int | None:
    """Return the window of a layer: by `layer_types`, or in all but the last layer of each period."""
    return window(config) if config.slides(layer) else None


def local_in_window(config: ModelConfig, layer: int) -> str:
    """Return the rotation of a layer: the layers with a window have one of their own."""
    return "local" if config.slides(layer) else "global"


# -- multimodal models ----------------------------------------------------------------------------------------------

# names of the text part in transformers 5 and 4, and the tensors of the other parts
TEXT_PART = (
    (r"^language_model\.lm_head\b", "lm_head"),
    (r"^(model\.)?language_model\.(model\.)?", "model."),
)
TOWERS = (r"(model\.)?(vision_tower|vision_model|multi_modal_projector)(\..*)?",)
