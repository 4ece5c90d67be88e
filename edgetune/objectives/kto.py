"""Kahneman-Tversky optimization: answers that are labelled one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from edgetune.objectives.base import CHOSEN, MARGIN, REJECTED, Batching, Objective, ObjectiveFacts, ObjectiveMetric


class Kto(Objective):
    """KTO: desirable answers become more likely than the base has them, others less (arXiv:2402.01306)."""

    facts: ClassVar[ObjectiveFacts] = ObjectiveFacts(
        "KTO",
        "arXiv:2402.01306",
        "KTOTrainer",
        (
            MARGIN,
            ObjectiveMetric("kl", "kl", "estimated KL divergence from the base, in nats per answer"),
            CHOSEN,
            REJECTED,
        ),
        needs_reference=True,
    )

    kind: Literal["kto"] = "kto"
    """The objective."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the model is held to the base; smaller: farther from it."""
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """`apo_zero_unpaired`: without the estimate of the KL divergence (arXiv:2408.06266)."""
    desirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the desirable answers; raise it if they are fewer than the others."""
    undesirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the undesirable answers."""

    def contradictions(self, batching: Batching) -> Iterator[str]:
        """Yield what cannot be trained together."""
        if self.loss_type == "kto" and batching.batch_size < 2:
            yield "objective.kind kto estimates the KL divergence within a batch: training.batch_size must be 2 or more"

    def trl_options(self) -> dict[str, Any]:
        """Return the options under TRL's names."""
        return {
            "beta": self.beta,
            "loss_type": self.loss_type,
            "desirable_weight": self.desirable_weight,
            "undesirable_weight": self.undesirable_weight,
        }
