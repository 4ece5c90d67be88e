"""PEANuT: updates computed from the base by a small network (arXiv:2410.01870)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from edgetune.methods.base import Count, Facts, PerLayerMethod, Positive


class Peanut(PerLayerMethod):
    """PEANuT: a small network computes the update of each layer from its weights (arXiv:2410.01870)."""

    facts: ClassVar[Facts] = Facts(
        "PEANuT", "arXiv:2410.01870", "reparametrized", "PEANUT",
        not_on=dict.fromkeys((4, 8), "PEFT feeds the packed weights to its network"),
        no_low_rank="it is computed from the base",
    )  # fmt: skip
    peft_names: ClassVar[Mapping[str, str]] = {"activation": "act_fn"}

    kind: Literal["peanut"] = "peanut"
    """The PEFT method."""
    r: Count = 32
    """Width of the network."""
    depth: Annotated[int, Field(ge=0)] = 0
    """Pairs of hidden layers beside the first and the last."""
    activation: Literal["relu", "gelu", "silu", "tanh", "sigmoid"] = "relu"
    """Function between the layers."""
    scaling: Positive = 1.0
    """The update is scaled by this number."""

    def trainable_in(self, rows: int, columns: int) -> int:
        """Return the parameters of the network."""
        return 2 * self.r * rows + 2 * self.depth * self.r**2
