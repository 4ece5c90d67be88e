"""HiRA: the base multiplied elementwise by a low-rank matrix (ICLR 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from edgetune.methods.base import Count, Dropout, Facts, LayerMethod, Layers, of_pattern


class HiRa(LayerMethod):
    """HiRA: the update is the elementwise product of the base and a low-rank matrix (ICLR 2025, TwJrTz9cRS)."""

    facts: ClassVar[Facts] = Facts(
        "HiRA", "openreview:TwJrTz9cRS", "reparametrized", "HIRA",
        no_low_rank="the elementwise product with the base has full rank",
    )  # fmt: skip
    peft_names: ClassVar[Mapping[str, str]] = {"dropout": "hira_dropout"}

    kind: Literal["hira"] = "hira"
    """The PEFT method."""
    r: Count = 32
    """Rank of the matrix that multiplies the base."""
    dropout: Dropout = 0.0
    """Dropout of the inputs during training."""
    rank_pattern: dict[str, Count] = {}
    """Ranks by the end of the layer's name, or by a regular expression."""

    def count_trainable(self, layers: Layers) -> int:
        """Return the parameters of A and B of each layer."""
        return sum(of_pattern(self.rank_pattern, name, self.r) * sum(shape) for name, shape in layers.items())
