"""Continued pretraining: every token of plain text is learned."""

from __future__ import annotations

from typing import ClassVar, Literal

from edgetune.objectives.base import NATS, Objective, ObjectiveFacts, ObjectiveMetric


class Pretrain(Objective):
    """Continued pretraining: the cross-entropy of every token of plain text (arXiv:2004.10964)."""

    facts: ClassVar[ObjectiveFacts] = ObjectiveFacts(
        "continued pretraining",
        "arXiv:2004.10964",
        "SFTTrainer",
        (
            ObjectiveMetric(
                "token_accuracy", "mean_token_accuracy", "share of the tokens that the model finds most likely"
            ),
        ),
        loss_unit=NATS,
    )

    kind: Literal["pretrain"] = "pretrain"
    """The objective."""
