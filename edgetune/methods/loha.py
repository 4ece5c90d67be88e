"""LoHa: the Hadamard product of two low-rank updates (arXiv:2108.06098)."""

from __future__ import annotations

from typing import ClassVar, Literal

from edgetune.methods.base import Count, Dropout, Facts, LayerMethod, Layers, Positive, of_pattern


class LoHa(LayerMethod):
    """LoHa: the update is the Hadamard product of two low-rank matrices (arXiv:2108.06098)."""

    facts: ClassVar[Facts] = Facts(
        "LoHa", "arXiv:2108.06098", "reparametrized", "LOHA",
        not_on={4: "PEFT's layer takes the shape of the packed weights for that of the matrix"},
        no_low_rank="the rank of its update is the square of r",
    )  # fmt: skip

    kind: Literal["loha"] = "loha"
    """The PEFT method."""
    r: Count = 8
    """Rank of each of the two factors; their product has up to the square of it."""
    alpha: Positive = 8
    """The update is scaled by alpha / r."""
    rank_dropout: Dropout = 0.0
    """Dropout of ranks during training."""
    module_dropout: Dropout = 0.0
    """Probability to leave out a layer's update during training."""
    rank_pattern: dict[str, Count] = {}
    """Ranks by the end of the layer's name, or by a regular expression."""
    alpha_pattern: dict[str, Positive] = {}
    """Alphas in the same way."""

    def count_trainable(self, layers: Layers) -> int:
        """Return the parameters of two pairs of low-rank matrices for each layer."""
        return sum(2 * of_pattern(self.rank_pattern, name, self.r) * sum(shape) for name, shape in layers.items())
