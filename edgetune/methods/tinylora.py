"""TinyLoRA: a few trained numbers between singular vectors of the base (arXiv:2602.04118)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from edgetune.methods.base import THROUGH_PEFT, Count, Dropout, Facts, LayerMethod, Layers


class TinyLora(LayerMethod):
    """TinyLoRA: a short trained vector for each group of layers, expanded by frozen projections (arXiv:2602.04118)."""

    facts: ClassVar[Facts] = Facts(
        "TinyLoRA", "arXiv:2602.04118", "reparametrized", "TINYLORA",
        not_on=dict.fromkeys((4, 8), "its start is a singular value decomposition of unpacked weights"),
        no_low_rank=THROUGH_PEFT,
    )  # fmt: skip
    peft_names: ClassVar[Mapping[str, str]] = {"dropout": "tinylora_dropout", "seed": "projection_seed"}
    fixed_options: ClassVar[Mapping[str, Any]] = {"save_projection": True}
    starts_from_base: ClassVar[bool] = True

    kind: Literal["tinylora"] = "tinylora"
    """The PEFT method."""
    r: Count = 2
    """Singular vectors of the base that are used."""
    u: Count = 64
    """Trained numbers of each group of layers."""
    weight_tying: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How far layers share them: 0 not at all, 1 one group of all."""
    dropout: Dropout = 0.0
    """Dropout of the inputs during training."""
    seed: int = 42
    """Seed of the frozen projections, which are stored with the adapter."""

    def count_trainable(self, layers: Layers) -> int:
        """Return the numbers of all groups."""
        if not layers:
            return 0
        groups = max(1, round(len(layers) * (1 - self.weight_tying)))
        size = max(1, len(layers) // groups)
        return self.u * len({min(number // size, groups - 1) for number in range(len(layers))})

    def count_frozen(self, layers: Layers) -> int:
        """Return the values of the projections and of the singular vectors."""
        return sum(self.u * self.r**2 + self.r * (sum(shape) + 1) for shape in layers.values())
