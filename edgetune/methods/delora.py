"""DeLoRA: low-rank updates of bounded norm (arXiv:2503.18225)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from edgetune.methods.base import Count, Dropout, Facts, LayerMethod, Layers, Positive, of_pattern


class DeLora(LayerMethod):
    """DeLoRA: a normalized low-rank update with a trained bound of its norm (arXiv:2503.18225)."""

    facts: ClassVar[Facts] = Facts(
        "DeLoRA", "arXiv:2503.18225", "reparametrized", "DELORA",
        not_on=dict.fromkeys((4, 8), "PEFT takes the norms of the packed weights"),
    )  # fmt: skip
    peft_names: ClassVar[Mapping[str, str]] = {
        "bound": "delora_lambda", "dropout": "module_dropout", "bound_pattern": "lambda_pattern",
    }  # fmt: skip
    starts_from_base: ClassVar[bool] = True

    kind: Literal["delora"] = "delora"
    """The PEFT method."""
    r: Count = 8
    """Rank of the update."""
    bound: Positive = 15
    """First value of the bound (lambda): the update's norm, in norms of the base's columns, is at most that."""
    dropout: Dropout = 0.0
    """Probability to leave out a layer's update during training."""
    rank_pattern: dict[str, Count] = {}
    """Ranks by the end of the layer's name, or by a regular expression."""
    bound_pattern: dict[str, Positive] = {}
    """Bounds in the same way."""

    def count_trainable(self, layers: Layers) -> int:
        """Return the parameters of A, B and the bound of each layer."""
        return sum(1 + of_pattern(self.rank_pattern, name, self.r) * sum(shape) for name, shape in layers.items())

    def count_frozen(self, layers: Layers) -> int:
        """Return the norms of the base's columns."""
        return sum(columns for _, columns in layers.values())
