"""What the matching of an adapter needs to know of the base: names, shapes, and how matrices are stored."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from edgetune_converters.adapters.expert_factors import ExpertPart
from edgetune_converters.tensors import Read


@dataclass(frozen=True)
class BaseTargets:
    """What an adapter needs to know of the base."""

    shapes: Mapping[str, tuple[int, ...]]
    """Names and shapes of the base's tensors, and of the parameters that hold several of them."""
    renamed: Callable[[str], str] = str
    """Maps the name of a module or a tensor to the spelling of `shapes`."""
    transposed: Collection[str] | None = None
    """The targets that the base stores transposed (PEFT's `fan_in_fan_out`). None: unknown, so the adapter decides."""
    experts: Mapping[str, ExpertPart] = field(default_factory=dict)
    """Modules of single experts that are parts of a target of all experts."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """The output matrix, where it is the embedding: its target and that of the embedding."""
    beside_text: Callable[[str], bool] = lambda module: False
    """Whether a module belongs to a part of a multimodal model that texts do not pass through."""
    shapes_beside_text: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Names and shapes of the tensors of that part, as the checkpoint spells them."""
    reader: Callable[[str], Read] | None = None
    """Returns the reader of a target as the base stores it, for a change of one tensor that another determines."""

    def shape_beside_text(self, module: str) -> tuple[int, ...] | None:
        """Return the shape of the weight of a module that texts do not pass through; None where it is not known.

        Checkpoints spell the beginning of these names in another way than modules: the longest common end counts.
        """
        parts = f"{module}.weight".split(".")
        for first in range(len(parts) - 2):
            end = "." + ".".join(parts[first:])
            found = {shape for name, shape in self.shapes_beside_text.items() if f".{name}".endswith(end)}
            if found:
                return found.pop() if len(found) == 1 else None
        return None

    def fits(self, module: str) -> bool:
        """Whether a module's name is one of the base: it has a weight or a bias, or the parameters of all experts."""
        name = self.renamed(module)
        single = any(self.renamed(f"{module}.{part}") in self.shapes for part in ("weight", "bias"))
        return single or name in self.experts or re.sub(r"(\.base_layer)+$", "", name) in self._with_experts

    @cached_property
    def _with_experts(self) -> set[str]:
        return {target.rpartition(".")[0] for target, shape in self.shapes.items() if len(shape) == 3}
