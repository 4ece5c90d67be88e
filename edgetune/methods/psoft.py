"""PSOFT: rotations in the principal subspace of the base (openreview:FSHrinMArK)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from edgetune.methods.base import THROUGH_PEFT, Count, Dropout, Facts, LayerMethod, PerLayerMethod, Positive


class Psoft(PerLayerMethod):
    """PSOFT: a trained rotation within the principal subspace of each layer (openreview:FSHrinMArK)."""

    facts: ClassVar[Facts] = Facts(
        "PSOFT", "openreview:FSHrinMArK", "reparametrized", "PSOFT",
        not_on=dict.fromkeys((4, 8), "its start is a singular value decomposition of unpacked weights"),
        no_low_rank=THROUGH_PEFT,
    )  # fmt: skip
    peft_names: ClassVar[Mapping[str, str]] = {
        "alpha": "psoft_alpha", "dropout": "psoft_dropout", "orthogonal": "psoft_orth", "scale_inputs": "psoft_mag_a",
        "scale_outputs": "psoft_mag_b", "svd": "psoft_svd", "svd_iterations": "psoft_svd_lowrank_niter",
        "seed": "random_seed",
    }  # fmt: skip
    not_for_peft: ClassVar[frozenset[str]] = LayerMethod.not_for_peft | {"init"}
    starts_from_base: ClassVar[bool] = True
    takes_transposed: ClassVar[bool] = False
    used_with: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "svd_iterations": ("svd", "lowrank"),
        "seed": ("svd", "lowrank"),
        "use_cayley_neumann": ("orthogonal", True),
        "num_cayley_neumann_terms": ("use_cayley_neumann", True),
    }

    kind: Literal["psoft"] = "psoft"
    """The PEFT method."""
    r: Count = 32
    """Dimensions of the principal subspace."""
    alpha: Positive = 32
    """The update is scaled by alpha / r; equal to `r`, the rotation is exact."""
    dropout: Dropout = 0.0
    """Dropout of the inputs during training."""
    orthogonal: bool = True
    """Keep the trained matrix orthogonal (Cayley transform); false: any matrix."""
    scale_inputs: bool = True
    """Train a scale for each dimension before the rotation."""
    scale_outputs: bool = True
    """Train a scale for each dimension after it."""
    init: Literal["psoft", "pissa"] = "psoft"
    """How singular values are shared: `psoft` keeps the inner factor orthogonal, `pissa` takes their square roots."""
    svd: Literal["full", "lowrank"] = "full"
    """The singular value decomposition: exact, or by random projections."""
    svd_iterations: Count = 10
    """Power iterations of the latter."""
    seed: int = 0
    """Seed of the latter."""
    use_cayley_neumann: bool = False
    """Approximate the Cayley transform by a Neumann series."""
    num_cayley_neumann_terms: Count = 5
    """Terms of the series."""

    def peft_options(self) -> dict[str, Any]:
        """Return the options under PEFT's names."""
        return super().peft_options() | {"ab_svd_init": f"{self.init}_init"}

    def why_not_on(self, rows: int, columns: int) -> str | None:
        """Return why a linear layer of [rows, columns] cannot be adapted; None if it can."""
        smaller = min(rows, columns)
        return f"adapter.r is {self.r}, and it has {smaller} singular values" if self.r > smaller else None

    def trainable_in(self, rows: int, columns: int) -> int:
        """Return the parameters of the rotation and of the scales."""
        matrix = self.r * (self.r - 1) // 2 if self.orthogonal else self.r**2
        return matrix + self.r * (self.scale_inputs + self.scale_outputs)
