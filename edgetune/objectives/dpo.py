"""Direct preference optimization and its relatives with a reference model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from edgetune.objectives.base import PAIR_METRICS, Batching, Objective, ObjectiveFacts

SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
"""The losses that read `label_smoothing`."""


class Dpo(Objective):
    """DPO: the chosen answer becomes more likely than the rejected one, near the base (arXiv:2305.18290)."""

    facts: ClassVar[ObjectiveFacts] = ObjectiveFacts(
        "DPO", "arXiv:2305.18290", "DPOTrainer", PAIR_METRICS, needs_reference=True, rows_per_example=2
    )

    kind: Literal["dpo"] = "dpo"
    """The objective."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the model is held to the base; smaller: farther from it."""
    loss_type: Literal[
        "sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot",
        "aot_unpaired", "apo_zero", "apo_down", "discopop",
    ] = "sigmoid"  # fmt: skip
    """The loss of TRL's DPOTrainer: sigmoid (DPO), hinge (SLiC), ipo, robust, apo_zero and others."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the pairs that may be labelled the wrong way round; for robust, exo_pair and aot."""
    sft_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the cross-entropy of the chosen answers, which is added to the loss (RPO)."""

    def contradictions(self, batching: Batching) -> Iterator[str]:
        """Yield what cannot be trained together."""
        if self.label_smoothing and self.loss_type not in SMOOTHED:
            yield (
                f"objective.label_smoothing has no effect on loss_type {self.loss_type}: choose one of "
                f"{', '.join(SMOOTHED)}, or leave it out"
            )
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            yield "objective.loss_type exo_pair needs a label_smoothing above 0, such as 0.001"

    def trl_options(self) -> dict[str, Any]:
        """Return the options under TRL's names."""
        weights = {self.loss_type: 1.0} | ({"sft": self.sft_weight} if self.sft_weight else {})
        return {
            "beta": self.beta,
            "loss_type": list(weights),
            "loss_weights": list(weights.values()),
            "label_smoothing": self.label_smoothing,
        }
