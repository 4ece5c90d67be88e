"""Multitask prompt tuning: a shared prompt times a factor of low rank (arXiv:2303.02861)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from edgetune.methods.base import Facts
from edgetune.methods.virtual_tokens import NO_LORA, VirtualTokenMethod


class MultitaskPromptTuning(VirtualTokenMethod):
    """Multitask prompt tuning: a prompt of all tasks times a factor of low rank for each (arXiv:2303.02861)."""

    facts: ClassVar[Facts] = Facts(
        "multitask prompt tuning", "arXiv:2303.02861", "additive", "MULTITASK_PROMPT_TUNING", not_as=NO_LORA
    )

    kind: Literal["multitask-prompt-tuning"] = "multitask-prompt-tuning"
    """The PEFT method."""
    tasks: list[str] = []
    """Names of several tasks, which rows state under the key `data.columns.task`. Empty: all rows are of one task."""
    ranks: Annotated[int, Field(ge=1)] = 1
    """Rank of the factor."""

    @model_validator(mode="after")
    def _tasks_are_several(self) -> Self:
        if len(self.tasks) == 1 or len(set(self.tasks)) < len(self.tasks):
            raise ValueError("adapter.tasks names several different tasks; leave it out for one")
        return self

    def number_of(self, task: str | int | None) -> int:
        """Return the number of a task that is stated by name or number; None stands for the first."""
        return self.tasks.index(task) if isinstance(task, str) else task or 0

    def peft_options(self) -> dict[str, Any]:
        """Return the options under PEFT's names."""
        own = {"num_tasks": max(1, len(self.tasks)), "num_ranks": self.ranks, "prompt_tuning_init": "RANDOM"}
        return super().peft_options() | own
