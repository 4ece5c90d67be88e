"""Multitask prompt tuning: a shared prompt times a factor of low rank (arXiv:2303.02861)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from edgetune.methods.base import Facts
from edgetune.methods.virtual_tokens import NO_LORA, VirtualTokenMethod


class MultitaskPromptTuning(VirtualTokenMethod):
    """Multitask prompt tuning, of one task: a prompt times a factor of low rank (arXiv:2303.02861)."""

    facts: ClassVar[Facts] = Facts(
        "multitask prompt tuning", "arXiv:2303.02861", "additive", "MULTITASK_PROMPT_TUNING", not_as=NO_LORA
    )

    kind: Literal["multitask-prompt-tuning"] = "multitask-prompt-tuning"
    """The PEFT method."""
    ranks: Annotated[int, Field(ge=1)] = 1
    """Rank of the factor."""

    def peft_options(self) -> dict[str, Any]:
        """Return the options under PEFT's names."""
        return {**super().peft_options(), "num_tasks": 1, "num_ranks": self.ranks, "prompt_tuning_init": "RANDOM"}
