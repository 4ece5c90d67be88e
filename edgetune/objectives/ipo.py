"""Identity preference optimization."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from edgetune.objectives.base import PAIR_METRICS, Objective, ObjectiveFacts


class Ipo(Objective):
    """IPO: the margin between the answers is brought to 1 / (2 beta), which bounds it (arXiv:2310.12036)."""

    facts: ClassVar[ObjectiveFacts] = ObjectiveFacts(
        "IPO", "arXiv:2310.12036", "DPOTrainer", PAIR_METRICS, needs_reference=True, rows_per_example=2
    )

    kind: Literal["ipo"] = "ipo"
    """The objective."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """The regularization: the margin per token that is aimed at is 1 / (2 beta)."""

    def trl_options(self) -> dict[str, Any]:
        """Return the options under TRL's names."""
        return {"beta": self.beta, "loss_type": ["ipo"]}
