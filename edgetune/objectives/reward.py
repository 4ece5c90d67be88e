"""Reward modelling: a score for each answer, learned from preference pairs."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from edgetune.objectives.base import Objective, ObjectiveFacts, ObjectiveMetric


class RewardModel(Objective):
    """Reward model: a score head on the network, whose score is higher for the chosen answer (arXiv:2203.02155)."""

    facts: ClassVar[ObjectiveFacts] = ObjectiveFacts(
        "reward model",
        "arXiv:2203.02155",
        "RewardTrainer",
        (
            ObjectiveMetric("reward_margin", "margin", "score of the chosen answer less that of the rejected one"),
            ObjectiveMetric(
                "reward_accuracy", "accuracy", "share of the pairs whose chosen answer has the higher score"
            ),
            ObjectiveMetric("mean_score", "mean_reward", "mean score of all answers"),
        ),
        is_scorer=True,
        rows_per_example=2,
        logit_copies=0.0,
    )

    kind: Literal["reward"] = "reward"
    """The objective."""
    centering: Annotated[float, Field(ge=0)] = 0.0
    """Weight of a loss that keeps the mean of the scores at 0, such as 0.01 (arXiv:2312.09244)."""

    def trl_options(self) -> dict[str, Any]:
        """Return the options under TRL's names."""
        return {"center_rewards_coefficient": self.centering or None}
