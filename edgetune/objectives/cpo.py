"""Contrastive preference optimization."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from edgetune.objectives.base import (
    ACCURACY,
    CHOSEN,
    KL_OF_EVALUATIONS,
    MARGIN,
    REJECTED,
    Batching,
    Objective,
    ObjectiveFacts,
)


class Cpo(Objective):
    """CPO: DPO without a reference model, with the cross-entropy of the chosen answers (arXiv:2401.08417)."""

    facts: ClassVar[ObjectiveFacts] = ObjectiveFacts(
        "CPO",
        "arXiv:2401.08417",
        "trl.experimental.cpo.CPOTrainer",
        (MARGIN, ACCURACY, KL_OF_EVALUATIONS, CHOSEN, REJECTED),
        is_experimental=True,
        rows_per_example=2,
        logit_copies=3.5,
    )

    kind: Literal["cpo"] = "cpo"
    """The objective."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Scale of the margin between the answers."""
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """The loss of the margin."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the pairs that may be labelled the wrong way round; for sigmoid."""
    sft_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the cross-entropy of the chosen answers."""

    def contradictions(self, batching: Batching) -> Iterator[str]:
        """Yield what cannot be trained together."""
        if self.label_smoothing and self.loss_type != "sigmoid":
            yield f"objective.label_smoothing has no effect on loss_type {self.loss_type}; leave it out"

    def trl_options(self) -> dict[str, Any]:
        """Return the options under TRL's names."""
        return {
            "beta": self.beta,
            "loss_type": self.loss_type,
            "label_smoothing": self.label_smoothing,
            "cpo_alpha": self.sft_weight,
        }
