"""The errors that a user is meant to read.

The message states in one sentence what is wrong, with the offending value; `hint` says what to do. The command line
prints both and exits with `exit_code`, which nothing else decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class EdgetuneError(Exception):
    """A problem that the user can solve: a sentence with the value, and what to do (`hint`)."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    @classmethod
    def of_many(
        cls, what: str, problems: Sequence[str], hint: str | None = None, *, total: int | None = None
    ) -> EdgetuneError:
        """Return one error for several problems, so that the user can correct them together.

        Args:
            what: What they are, in the plural: "problems in the data".
            problems: One line each.
            hint: What to do about them.
            total: How many there are, where `problems` holds only the first ones.
        """
        total = total or len(problems)
        if total == 1:
            return cls(problems[0], hint)
        lines = [*problems, *([f"... and {total - len(problems)} more"] if total > len(problems) else [])]
        return cls(f"{total} {what}:\n" + "\n".join(f"  - {line}" for line in lines), hint)


class CheckpointError(EdgetuneError):
    """A base model that is missing, incomplete, damaged or in an unknown format."""


class AdapterError(EdgetuneError):
    """A PEFT adapter that does not fit the base, or of a kind that cannot be merged."""


class OnlyPeftError(AdapterError):
    """A PEFT adapter that PEFT itself merges, and the converters cannot."""


class ArchitectureError(EdgetuneError):
    """A model family, or a tensor of it, that the architecture table does not have."""


class TokenizerError(EdgetuneError):
    """A tokenizer that cannot be converted exactly."""


class ChatTemplateError(EdgetuneError):
    """A chat template that is not valid Jinja or refuses a conversation."""


class RecipeError(EdgetuneError):
    """A storage type that does not exist, or does not fit the rows of the tensors."""


class ArtifactError(EdgetuneError):
    """An exported file that is truncated, foreign, or different from its plan."""
