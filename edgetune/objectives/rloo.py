"""REINFORCE with a leave-one-out baseline."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from edgetune.objectives.base import ObjectiveFacts
from edgetune.objectives.online import METRICS, Online


class Rloo(Online):
    """RLOO: REINFORCE whose baseline of an answer is the mean reward of the other answers to the prompt
    (arXiv:2402.14740)."""

    facts: ClassVar[ObjectiveFacts] = ObjectiveFacts(
        "RLOO", "arXiv:2402.14740", "RLOOTrainer", METRICS, needs_reference=True, generates=True
    )

    kind: Literal["rloo"] = "rloo"
    """The objective."""
    beta: Annotated[float, Field(ge=0)] = 0.05
    """Weight of the KL divergence from the base, which is part of the reward; 0: none."""
    normalize_advantages: bool = False
    """Scale the advantages of a batch to mean 0 and standard deviation 1."""

    def trl_options(self) -> dict[str, Any]:
        """Return the options under TRL's names."""
        own = {"beta": self.beta, "normalize_advantages": self.normalize_advantages}
        return {**super().trl_options(), **own}
