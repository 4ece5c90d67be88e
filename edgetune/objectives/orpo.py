"""Odds ratio preference optimization."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from edgetune.objectives.base import PAIR_METRICS_PER_TOKEN, Objective, ObjectiveFacts, ObjectiveMetric


class Orpo(Objective):
    """ORPO: the cross-entropy of the chosen row and the odds ratio of the answers, without a reference model
    (arXiv:2403.07691)."""

    facts: ClassVar[ObjectiveFacts] = ObjectiveFacts(
        "ORPO",
        "arXiv:2403.07691",
        "trl.experimental.orpo.ORPOTrainer",
        (
            *PAIR_METRICS_PER_TOKEN,
            ObjectiveMetric("log_odds", "log_odds_chosen", "mean log odds ratio of chosen and rejected answers"),
        ),
        is_experimental=True,
        rows_per_example=2,
        logit_copies=3.5,
    )

    kind: Literal["orpo"] = "orpo"
    """The objective."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Weight of the odds ratio beside the cross-entropy; the paper calls it lambda."""

    def trl_options(self) -> dict[str, Any]:
        """Return the options under TRL's names."""
        return {"beta": self.beta}
