"""WaveFT: updates with sparse wavelet coefficients (arXiv:2505.12532)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from edgetune.methods.base import Count, Facts, LayerMethod, Layers, Positive, of_pattern


class WaveFt(LayerMethod):
    """WaveFT: the update is the inverse wavelet transform of sparse coefficients (arXiv:2505.12532)."""

    facts: ClassVar[Facts] = Facts(
        "WaveFT", "arXiv:2505.12532", "reparametrized", "WAVEFT",
        no_low_rank="sparse wavelet coefficients have no low rank",
    )  # fmt: skip
    peft_names: ClassVar[Mapping[str, str]] = {"seed": "random_loc_seed", "wavelet": "wavelet_family"}

    kind: Literal["waveft"] = "waveft"
    """The PEFT method."""
    n_frequency: Count = 2592
    """Trained coefficients of each layer; at most as many as it has weights."""
    scaling: Positive = 25
    """The update is scaled by this number."""
    wavelet: str = "db1"
    """Wavelet family, such as db1 (Haar), sym2 or coif1."""
    seed: int = 777
    """Seed of the choice of coefficients."""
    n_frequency_pattern: dict[str, Count] = {}
    """Numbers by the end of the layer's name, or by a regular expression."""

    def count_trainable(self, layers: Layers) -> int:
        """Return the number of coefficients."""
        return sum(of_pattern(self.n_frequency_pattern, name, self.n_frequency) for name in layers)
