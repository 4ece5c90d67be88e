"""Rows that families with a mixture of experts share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.architectures.families.common import LAYER, integer
from edgetune_converters.architectures.operations import Take, View
from edgetune_converters.architectures.table import FusedParameter, MetadataRow, Shape, TensorRow, When

Width = Callable[[ModelConfig], int]

# the block's name in the checkpoints of Mixtral and Granite -> its name in transformers today
SPARSE_BLOCK = (r"\.block_sparse_moe\.", ".mlp.")


def router(config: ModelConfig) -> tuple[int, ...]:
    """The shape of the router."""
    return config.experts, config.hidden


def expert_count(config: ModelConfig) -> int:
    """The number of experts."""
    return config.experts


def _none(config: ModelConfig) -> int:
    return 0


def _half(width: Width, number: int) -> Callable[[ModelConfig], tuple[View, ...]]:
    """Gate (0) or up (1) of a tensor that concatenates both, for each expert."""
    return lambda c: (View((Take(2 * width(c), number * width(c), width(c)),)),)


def expert_rows(width: Width, name: str = LAYER + "mlp.experts", when: When | None = None) -> tuple[TensorRow, ...]:
    """Return the rows of all experts, from checkpoints with one tensor per expert or with all of them fused."""
    into: Shape = lambda c: (width(c), c.hidden)  # noqa: E731
    back: Shape = lambda c: (c.hidden, width(c))  # noqa: E731
    fused: Shape = lambda c: (c.experts, 2 * width(c), c.hidden)  # noqa: E731
    fused_back: Shape = lambda c: (c.experts, *back(c))  # noqa: E731
    each: dict[str, Any] = {"stacked": expert_count} | ({"when": when} if when else {})
    whole: dict[str, Any] = {"weight": ""} | ({"when": when} if when else {})
    gates, ups = (FusedParameter(name + ".gate_up_proj", fused, first) for first in (_none, width))
    downs = FusedParameter(name + ".down_proj", fused_back, _none)
    return (
        TensorRow(name + ".{n}.gate_proj", "expert_gate", into, part_of=gates, **each),
        TensorRow(name + ".{n}.up_proj", "expert_up", into, part_of=ups, **each),
        TensorRow(name + ".{n}.down_proj", "expert_down", back, part_of=downs, **each),
        TensorRow(name + ".gate_up_proj", "expert_gate", fused, _half(width, 0), **whole),
        TensorRow(name + ".gate_up_proj", "expert_up", fused, _half(width, 1), **whole),
        TensorRow(name + ".down_proj", "expert_down", fused_back, **whole),
    )


def expert_width(config: ModelConfig) -> int:
    """Return the width of an expert that differs from a dense layer's."""
    return config.integer("moe_intermediate_size")


def dense_width(config: ModelConfig) -> int:
    """Return the width of an expert where no layer is dense."""
    return config.ffn


def transposed_experts(
    width: Width, steps: Callable[[int], tuple[Take, ...]]
) -> Callable[[ModelConfig], tuple[View, ...]]:
    """Return views of experts stored transposed, [hidden, width] each; `steps` take rows of each transposed matrix."""
    return lambda c: (View(steps(width(c)), transpose=Take(c.hidden, 0, c.hidden)),)


def transposed_down(config: ModelConfig) -> tuple[View, ...]:
    """The down matrix of each expert, stored transposed."""
    return (View(transpose=Take(config.ffn, 0, config.ffn)),)


def stored_gate_up(config: ModelConfig) -> tuple[int, ...]:
    """The shape of gate and up of all experts in one tensor, transposed."""
    return config.experts, config.hidden, 2 * config.ffn


def stored_down(config: ModelConfig) -> tuple[int, ...]:
    """The shape of the down matrices of all experts in one tensor, transposed."""
    return config.experts, config.ffn, config.hidden


EXPERT_COUNTS: tuple[MetadataRow, ...] = (
    ("expert_count", integer("num_experts")),
    ("expert_used_count", integer("num_experts_per_tok")),
)
EXPERT_WIDTH: MetadataRow = ("expert_feed_forward_length", integer("moe_intermediate_size"))
ROUTER = TensorRow(LAYER + "mlp.gate", "expert_router", router)
