"""The common base of methods that train tensors of the base itself and that PEFT does not have."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from edgetune.methods.base import Layers, Method

NO_LOW_RANK = "it replaces whole tensors of the base, and gguf-lora holds products of two low-rank matrices"


class SelectiveMethod(Method):
    """A method that trains tensors of the base itself; the run stores their trained values."""

    def peft_options(self) -> dict[str, Any]:
        """Return no options: PEFT does not have the method."""
        return {}

    def stored_options(self) -> dict[str, Any]:
        """Return the options that adapter_config.json states beside the name of the method."""
        return self.model_dump(mode="json", exclude={"kind"})

    @abstractmethod
    def count_in(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return the number of trained values of a base with these tensors, or an upper bound."""

    def count_trainable(self, layers: Layers) -> int:
        """Return the number of trained values of a base of these linear layers alone, or an upper bound."""
        return self.count_in({f"{name}.weight": shape for name, shape in layers.items()})

    @property
    def names_layers(self) -> bool:
        """Whether the options name layers, which must be compared with those of the base."""
        return True


def count_values(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the number of values of all tensors."""
    return sum(math.prod(shape) for shape in shapes.values())
