"""FRoD: sparse rotations in a basis that layers share (AAAI 2026)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from edgetune.methods.base import THROUGH_PEFT, Dropout, Facts, Layers, PerLayerMethod, Positive


class Frod(PerLayerMethod):
    """FRoD: scales and a sparse rotation in a basis that equal layers share (AAAI 2026)."""

    facts: ClassVar[Facts] = Facts(
        "FRoD", "doi:10.1609/aaai.v40i31.39813", "reparametrized", "FROD",
        not_on=dict.fromkeys((4, 8), "its basis is computed from unpacked weights"),
        no_low_rank=THROUGH_PEFT,
    )  # fmt: skip
    peft_names: ClassVar[Mapping[str, str]] = {
        "dropout": "frod_dropout", "seed": "projection_prng_key", "regularization": "regularization_alpha",
    }  # fmt: skip
    fixed_options: ClassVar[Mapping[str, Any]] = {"save_projection": True, "progressbar": False}
    starts_from_base: ClassVar[bool] = True

    kind: Literal["frod"] = "frod"
    """The PEFT method."""
    sparse_rate: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of the entries of the rotation that are trained."""
    dropout: Dropout = 0.0
    """Dropout of the inputs during training."""
    regularization: Positive = 0.001
    """Added to the diagonal where the basis is computed, for layers that resemble each other."""
    seed: int = 0
    """Seed of the choice of entries, which are stored with the adapter."""

    def trainable_in(self, rows: int, columns: int) -> int:
        """Return the scales and the entries of the rotation."""
        entries = min(int(columns * columns * self.sparse_rate), columns * (columns - 1))
        return columns + (max(1, entries) if self.sparse_rate > 0 else 0)

    def count_frozen(self, layers: Layers) -> int:
        """Return the values of the bases and the places of the entries, one for each width of inputs: a lower bound."""
        return sum(
            columns**2 + 2 * int(columns**2 * self.sparse_rate) for columns in {each[1] for each in layers.values()}
        )
