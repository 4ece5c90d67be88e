"""RandLoRA: full-rank updates of scaled random bases (arXiv:2502.00987)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from edgetune.methods.base import Count, Dropout, Facts, Layers, PerLayerMethod, Positive


class RandLora(PerLayerMethod):
    """RandLoRA: an update of full rank, a sum of shared random bases with trained scales (arXiv:2502.00987)."""

    facts: ClassVar[Facts] = Facts(
        "RandLoRA", "arXiv:2502.00987", "reparametrized", "RANDLORA",
    )  # fmt: skip
    peft_names: ClassVar[Mapping[str, str]] = {
        "alpha": "randlora_alpha", "dropout": "randlora_dropout", "seed": "projection_prng_key",
    }  # fmt: skip
    fixed_options: ClassVar[Mapping[str, Any]] = {"save_projection": True}

    kind: Literal["randlora"] = "randlora"
    """The PEFT method."""
    r: Count = 32
    """Rank of each random basis: the smaller, the more parameters are trained."""
    alpha: Positive = 640
    """The update is scaled by alpha / r."""
    dropout: Dropout = 0.0
    """Dropout before the bases during training."""
    sparse: bool = False
    """Bases of -1, 0 and 1."""
    very_sparse: bool = False
    """Bases of -1, 0 and 1, most of them 0."""
    seed: int = 0
    """Seed of the frozen projections, which are stored with the adapter."""

    def contradictions(self) -> Iterator[str]:
        """Yield what contradicts one another among the options, each a sentence."""
        if self.sparse and self.very_sparse:
            yield "adapter.sparse and adapter.very_sparse exclude each other; give one of them"

    def trainable_in(self, rows: int, columns: int) -> int:
        """Return the scales of the bases."""
        smaller = min(rows, columns)
        return math.ceil(smaller / self.r) * (self.r + smaller)

    def count_frozen(self, layers: Layers) -> int:
        """Return the values of the shared bases, which are as large as the largest layer asks."""
        sides = [max((shape[axis] for shape in layers.values()), default=0) for axis in (0, 1)]
        return self.r * (min(sides) + max(sides) * math.ceil(min(sides) / self.r))
