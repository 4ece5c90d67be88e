"""Runtime-neutral description of a decoder, from which a graph is assembled.

A description combines the config, the family's differences from Llama (`Traits`, a part of its row in the table), and
the tensors that the model really has (a bias, a norm or a gate may be absent).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.architectures.rotation import Rotation, rotation
from edgetune_converters.errors import ArchitectureError

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
HeadNorm = Literal["head", "each head", "all heads"]
NumberOf = Callable[[ModelConfig], float]
Slot = tuple[str, int | None, str]  # slot, layer, "weight" or "bias"

# the names that transformers gives the activations
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
}  # fmt: skip


@dataclass(frozen=True)
class Norm:
    """x / sqrt(mean(x^2) + epsilon) times a weight (rms), or the same of x - mean(x) plus a bias (layer)."""

    kind: Literal["rms", "layer"]
    epsilon: float


class Order(Enum):
    """How attention and feed-forward layer are connected."""

    SEQUENTIAL = "the feed-forward layer reads the residual stream after the attention"
    PARALLEL = "both read the same residual stream, through one norm or one each"


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention with a key-value cache.

    `window` is the number of visible positions, including the current one. `rotation` names a rotation of the decoder.
    `interleaved` rotates neighboring values instead of values half a head apart.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    soft_cap: float = 0.0
    window: int | None = None
    rotation: str | None = None
    interleaved: bool = False
    head_norm: HeadNorm | None = None


@dataclass(frozen=True)
class FeedForward:
    """down(act(gate(x)) * up(x)) when gated, else down(act(up(x)))."""

    activation: Activation
    gated: bool = True


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: softmax over all, weighted sum of the `used` best.

    `normalized`: the weights of the best are divided by their sum. `shared`: a dense feed-forward layer is added;
    `shared_gate`: after multiplication with a sigmoid.
    """

    activation: Activation
    count: int
    used: int
    normalized: bool
    shared: bool = False
    shared_gate: bool = False


@dataclass(frozen=True)
class Block:
    """One layer. Norms before (pre) and after (post) a part exist where the model has their weights."""

    attention: Attention
    feed_forward: FeedForward | Experts
    order: Order


@dataclass(frozen=True)
class DecoderSpec:
    """A whole model. `slots` lists its weights and biases; a scale of 1 and a cap of 0 mean none."""

    hidden: int
    vocabulary: int
    context: int
    norm: Norm
    blocks: tuple[Block, ...]
    rotations: Mapping[str, Rotation]
    slots: frozenset[Slot]
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float = 0.0

    def has(self, slot: str, layer: int | None = None, part: str = "weight") -> bool:
        """Whether the model has this weight or bias."""
        return (slot, layer, part) in self.slots


def _one(config: ModelConfig) -> float:
    return 1.0


def _none(config: ModelConfig) -> float:
    return 0.0


def _root(config: ModelConfig) -> float:
    return float(config.head_dim**-0.5)


def _everywhere(config: ModelConfig, layer: int) -> int | None:
    return None


def _global(config: ModelConfig, layer: int) -> str | None:
    return "global"


def _sequential(config: ModelConfig) -> bool:
    return False


@dataclass(frozen=True)
class Traits:
    """How a family's decoder differs from Llama's.

    `rotation` returns the name of a layer's rotation ("global", "local"), None for an unrotated layer. `refusal` says
    why a model of the family cannot be described, None where it can. `scales_lookup`: transformers applies
    `embedding_scale` inside the lookup of tokens, so that vectors given in place of tokens are not scaled.
    """

    norm: Literal["rms", "layer"] = "rms"
    activation: Callable[[ModelConfig], Any] = lambda config: config.get("hidden_act", "silu")
    attention_scale: NumberOf = _root
    attention_cap: NumberOf = _none
    window: Callable[[ModelConfig, int], int | None] = _everywhere
    rotation: Callable[[ModelConfig, int], str | None] = _global
    interleaved: bool = False
    parallel: Callable[[ModelConfig], bool] = _sequential
    embedding_scale: NumberOf = _one
    scales_lookup: bool = False
    residual_scale: NumberOf = _one
    logit_scale: NumberOf = _one
    logit_cap: NumberOf = _none
    normalized_experts: Callable[[ModelConfig], bool] = lambda config: True
    refusal: Callable[[ModelConfig], str | None] = lambda config: None


def describe(traits: Traits, config: ModelConfig, tensors: Mapping[Slot, tuple[int, ...]]) -> DecoderSpec:
    """Return the description of a model with these tensors (slot -> shape).

    Raises ArchitectureError for a model that cannot be described.
    """
    if (problem := traits.refusal(config)) is not None:
        raise ArchitectureError(problem)
    blocks = tuple(_block(traits, config, tensors, layer) for layer in range(config.layers))
    epsilon = "rms_norm_eps" if traits.norm == "rms" else "layer_norm_eps"
    return DecoderSpec(
        hidden=config.hidden,
        vocabulary=config.vocab_size,
        context=config.context,
        norm=Norm(traits.norm, config.number(epsilon, 1e-6 if traits.norm == "rms" else 1e-5)),
        blocks=blocks,
        rotations=_rotations(config, {block.attention.rotation for block in blocks}),
        slots=frozenset(tensors),
        embedding_scale=traits.embedding_scale(config),
        residual_scale=traits.residual_scale(config),
        logit_scale=traits.logit_scale(config),
        logit_cap=traits.logit_cap(config),
    )


def _rotations(config: ModelConfig, names: Collection[str | None]) -> dict[str, Rotation]:
    parameters = {"global": config.rope, "local": config.local_rope}
    context = config.integer("max_position_embeddings")
    return {name: rotation(parameters[name], config.rope_dim, context) for name in sorted(filter(None, names))}


def _block(traits: Traits, config: ModelConfig, tensors: Mapping[Slot, tuple[int, ...]], layer: int) -> Block:
    attention = Attention(
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        scale=traits.attention_scale(config),
        soft_cap=traits.attention_cap(config),
        window=traits.window(config, layer),
        rotation=traits.rotation(config, layer),
        interleaved=traits.interleaved,
        head_norm=_head_norm(config, tensors.get(("attention_q_norm", layer, "weight"))),
    )
    order = Order.PARALLEL if traits.parallel(config) else Order.SEQUENTIAL
    return Block(attention, _feed_forward(traits, config, tensors, layer), order)


def _head_norm(config: ModelConfig, shape: tuple[int, ...] | None) -> HeadNorm | None:
    """What the norm of the queries covers, derived from the shape of its weight."""
    if shape is None:
        return None
    if len(shape) == 2:
        return "each head"
    return "head" if shape == (config.head_dim,) else "all heads"


def _activation(traits: Traits, config: ModelConfig) -> Activation:
    stated = traits.activation(config)
    if stated not in ACTIVATIONS:
        raise ArchitectureError(f"config.json: the activation {stated!r}: only {', '.join(ACTIVATIONS)} can be written")
    return ACTIVATIONS[stated]


def _feed_forward(
    traits: Traits, config: ModelConfig, tensors: Mapping[Slot, tuple[int, ...]], layer: int
) -> FeedForward | Experts:
    activation = _activation(traits, config)
    if ("expert_router", layer, "weight") in tensors:
        return Experts(
            activation,
            config.experts,
            config.integer("num_experts_per_tok"),
            traits.normalized_experts(config),
            shared=("shared_up", layer, "weight") in tensors,
            shared_gate=("shared_router", layer, "weight") in tensors,
        )
    fused = tensors[("ffn_up", layer, "weight")][0] == 2 * tensors[("ffn_down", layer, "weight")][-1]
    return FeedForward(activation, fused or ("ffn_gate", layer, "weight") in tensors)
