"""FourierFT: updates with a sparse spectrum (arXiv:2405.03003)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from edgetune.methods.base import Count, Facts, LayerMethod, Layers, Positive, of_pattern


class FourierFt(LayerMethod):
    """FourierFT: the update is the inverse Fourier transform of a sparse spectrum (arXiv:2405.03003)."""

    facts: ClassVar[Facts] = Facts(
        "FourierFT", "arXiv:2405.03003", "reparametrized", "FOURIERFT",
        no_low_rank="a sparse spectrum has no low rank",
    )  # fmt: skip
    peft_names: ClassVar[Mapping[str, str]] = {"seed": "random_loc_seed"}
    not_for_peft: ClassVar[frozenset[str]] = LayerMethod.not_for_peft | {"init"}

    kind: Literal["fourierft"] = "fourierft"
    """The PEFT method."""
    n_frequency: Count = 1000
    """Trained coefficients of each layer; at most as many as it has weights."""
    scaling: Positive = 150
    """The update is scaled by this number."""
    seed: int = 777
    """Seed of the choice of frequencies."""
    init: Literal["gaussian", "zero"] = "gaussian"
    """First values of the spectrum; `zero` starts from the base."""
    n_frequency_pattern: dict[str, Count] = {}
    """Numbers by the end of the layer's name, or by a regular expression."""

    def peft_options(self) -> dict[str, Any]:
        """Return the options under PEFT's names."""
        return super().peft_options() | {"init_weights": self.init == "zero"}

    def count_trainable(self, layers: Layers) -> int:
        """Return the number of coefficients."""
        return sum(of_pattern(self.n_frequency_pattern, name, self.n_frequency) for name in layers)
