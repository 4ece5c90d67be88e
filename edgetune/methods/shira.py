"""SHiRA: a sparse set of the weights (arXiv:2406.13175)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from edgetune.methods.base import Count, Facts, Layers, PerLayerMethod


class Shira(PerLayerMethod):
    """SHiRA: a sparse, random set of the weights of each layer is trained (arXiv:2406.13175)."""

    facts: ClassVar[Facts] = Facts(
        "SHiRA", "arXiv:2406.13175", "selective", "SHIRA",
        no_low_rank="a sparse update has full rank",
    )  # fmt: skip
    peft_names: ClassVar[Mapping[str, str]] = {"seed": "random_seed"}
    starts_from_base: ClassVar[bool] = True

    kind: Literal["shira"] = "shira"
    """The PEFT method."""
    r: Count = 32
    """As many weights of a layer are trained as LoRA of this rank would have parameters."""
    seed: int = 0
    """Seed of the choice, which is stored with the adapter."""

    def why_not_on(self, rows: int, columns: int) -> str | None:
        """Return why a linear layer of [rows, columns] cannot be adapted; None if it can."""
        wanted = self.trainable_in(rows, columns)
        if wanted <= rows * columns:
            return None
        return f"adapter.r {self.r} asks for {wanted:,} of its weights, and it has {rows * columns:,}"

    def trainable_in(self, rows: int, columns: int) -> int:
        """Return the number of chosen weights."""
        return self.r * (rows + columns)

    def count_frozen(self, layers: Layers) -> int:
        """Return the numbers of row and column of each chosen weight."""
        return 2 * self.count_trainable(layers)
