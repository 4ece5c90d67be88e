"""Supervised fine-tuning: the assistant's answers are learned."""

from __future__ import annotations

from typing import ClassVar, Literal

from edgetune.objectives.base import NATS, Objective, ObjectiveFacts


class Sft(Objective):
    """Supervised fine-tuning: the cross-entropy of the assistant's answers (arXiv:2203.02155)."""

    facts: ClassVar[ObjectiveFacts] = ObjectiveFacts("SFT", "arXiv:2203.02155", "SFTTrainer", loss_unit=NATS)

    kind: Literal["sft"] = "sft"
    """The objective."""
