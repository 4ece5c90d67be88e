"""Simple preference optimization."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from edgetune.objectives.base import PAIR_METRICS_PER_TOKEN, Objective, ObjectiveFacts


class Simpo(Objective):
    """SimPO: the mean log-probability per token of the chosen answer exceeds that of the rejected one by a margin,
    without a reference model (arXiv:2405.14734)."""

    facts: ClassVar[ObjectiveFacts] = ObjectiveFacts(
        "SimPO",
        "arXiv:2405.14734",
        "trl.experimental.cpo.CPOTrainer",
        PAIR_METRICS_PER_TOKEN,
        is_experimental=True,
        rows_per_example=2,
        logit_copies=3.0,
    )

    kind: Literal["simpo"] = "simpo"
    """The objective."""
    beta: Annotated[float, Field(gt=0)] = 2.0
    """Scale of the margin between the answers."""
    gamma: Annotated[float, Field(ge=0)] = 1.0
    """The margin that is aimed at, on the scale of beta times log-probability."""
    sft_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the cross-entropy of the chosen answers (CPO-SimPO)."""

    def trl_options(self) -> dict[str, Any]:
        """Return the options under TRL's names."""
        return {"beta": self.beta, "loss_type": "simpo", "simpo_gamma": self.gamma, "cpo_alpha": self.sft_weight}
