"""Group relative policy optimization."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from edgetune.objectives.base import ObjectiveFacts
from edgetune.objectives.online import METRICS, Online


class Grpo(Online):
    """GRPO: of several answers to a prompt, those with more reward than the others become more likely
    (arXiv:2402.03300)."""

    facts: ClassVar[ObjectiveFacts] = ObjectiveFacts(
        "GRPO", "arXiv:2402.03300", "GRPOTrainer", METRICS, needs_reference=True, generates=True
    )

    kind: Literal["grpo"] = "grpo"
    """The objective."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL divergence from the base; 0: none, which saves a forward pass."""
    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo", "cispo"] = "dapo"
    """How the losses of tokens are averaged: over the batch (dapo, bnpo), over each answer (grpo), over
    `max_completion_length` (dr_grpo); cispo clips the weights alone."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the rewards of a prompt, of the batch, or not at all."""

    def trl_options(self) -> dict[str, Any]:
        """Return the options under TRL's names."""
        own = {"beta": self.beta, "loss_type": self.loss_type, "scale_rewards": self.scale_rewards}
        return {**super().trl_options(), **own}
