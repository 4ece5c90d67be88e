"""VeRA: trained vectors between shared random projections (arXiv:2310.11454)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from edgetune.methods.base import Count, Dropout, Facts, Layers, PerLayerMethod


class Vera(PerLayerMethod):
    """VeRA: two trained vectors for each layer, between random projections that all layers share (arXiv:2310.11454)."""

    facts: ClassVar[Facts] = Facts("VeRA", "arXiv:2310.11454", "reparametrized", "VERA")
    peft_names: ClassVar[Mapping[str, str]] = {"dropout": "vera_dropout", "seed": "projection_prng_key"}
    fixed_options: ClassVar[Mapping[str, Any]] = {"save_projection": True}

    kind: Literal["vera"] = "vera"
    """The PEFT method."""
    r: Count = 256
    """Rank of the shared projections; higher than that of LoRA, since they are not trained."""
    dropout: Dropout = 0.0
    """Dropout before the first projection during training."""
    d_initial: float = 0.1
    """First value of the vector between the projections."""
    seed: int = 0
    """Seed of the frozen projections, which are stored with the adapter."""

    def trainable_in(self, rows: int, columns: int) -> int:
        """Return the values of both vectors."""
        return self.r + rows

    def count_frozen(self, layers: Layers) -> int:
        """Return the values of the two projections, which are as large as the largest layer asks."""
        return self.r * sum(max((shape[axis] for shape in layers.values()), default=0) for axis in (0, 1))
