"""PVeRA: VeRA with a learned distribution between the projections (arXiv:2512.07703)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from edgetune.methods.base import Facts
from edgetune.methods.vera import Vera


class Pvera(Vera):
    """PVeRA: VeRA whose inner vector is sampled during training, and its mean afterwards (arXiv:2512.07703)."""

    facts: ClassVar[Facts] = Facts("PVeRA", "arXiv:2512.07703", "reparametrized", "PVERA")
    peft_names: ClassVar[Mapping[str, str]] = {"dropout": "pvera_dropout", "seed": "projection_prng_key"}

    kind: Literal["pvera"] = "pvera"  # type: ignore[assignment]
    """The PEFT method."""

    def trainable_in(self, rows: int, columns: int) -> int:
        """Return the values of the mean, its logarithmic variance, and the outer vector."""
        return 2 * self.r + rows
