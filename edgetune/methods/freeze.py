"""Partial fine-tuning: some blocks are trained and the others are frozen, as LLaMA-Factory's `freeze`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import field_validator

from edgetune.methods.base import Facts
from edgetune.methods.selective import NO_LOW_RANK, SelectiveMethod, count_values

_BLOCK = re.compile(r"\.(\d+)\.")
SIXTEEN_BITS = "it trains the weights of layers themselves, and quantized weights cannot be trained"


class Freeze(SelectiveMethod):
    """Partial fine-tuning: some blocks of the base are trained, the others are frozen."""

    facts: ClassVar[Facts] = Facts(
        "freeze",
        "LLaMA-Factory",
        "selective",
        None,
        not_on=dict.fromkeys((4, 8), SIXTEEN_BITS),
        not_as={"gguf-lora": NO_LOW_RANK},
    )

    kind: Literal["freeze"] = "freeze"
    """The method."""
    layers: int | list[int] = 2
    """The trained blocks: the last n; the first n as -n; or a list of their numbers, counted from 0."""
    modules: Literal["all"] | list[str] = "all"
    """The trained parts of these blocks: `all`, or names such as [mlp, self_attn.q_proj]."""
    also: list[Literal["embedding", "norm", "head"]] = []
    """Further trained parts: the embedding, the last norm, the head."""

    @field_validator("layers")
    @classmethod
    def _some_layers(cls, value: int | list[int]) -> int | list[int]:
        if value in (0, []):
            raise ValueError("it names no block; give the number of trained blocks, or a list of their numbers")
        if isinstance(value, list) and (min(value) < 0 or len(set(value)) < len(value)):
            raise ValueError("a list names each block once, counted from 0")
        return value

    def numbers(self, count: int) -> list[int]:
        """Return the numbers of the trained blocks among `count`; a number that does not exist is kept."""
        if isinstance(self.layers, list):
            return sorted(self.layers)
        return list(range(count - self.layers, count)) if self.layers > 0 else list(range(-self.layers))

    def count_in(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return the weights of the trained blocks; with `also`, those outside the blocks too."""
        layer_of = {name: int(match[1]) for name in shapes if (match := _BLOCK.search(name))}
        trained = set(self.numbers(max(layer_of.values(), default=-1) + 1))
        chosen = {
            name: shape
            for name, shape in shapes.items()
            if (layer_of[name] in trained if name in layer_of else self.also)
        }
        return count_values(chosen)
