"""The kinds of rows, and the objectives that are trained on each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RowKind:
    """A kind of rows."""

    description: str
    """What a row of the kind holds, for messages: 'preference pairs (chosen and rejected answers)'."""
    objectives: Sequence[str]
    """Values of `objective.kind` whose rows are of this kind."""


CONVERSATION, PAIR, LABELLED, PROMPT, TEXT = "conversation", "pair", "labelled", "prompt", "text"

KINDS: Mapping[str, RowKind] = {
    CONVERSATION: RowKind("conversations with an answer", ("sft", "distillation")),
    PAIR: RowKind("preference pairs (chosen and rejected answers)", ("dpo", "ipo", "orpo", "cpo", "simpo", "reward")),
    LABELLED: RowKind("answers with a label of true or false", ("kto",)),
    PROMPT: RowKind("prompts, with what the reward functions read", ("grpo", "rloo", "distillation")),
    TEXT: RowKind("plain text", ("pretrain",)),
}


def kinds_of(objective: str) -> tuple[str, ...]:
    """Return the kinds of rows that an objective is trained on; the first is the usual one."""
    found = tuple(kind for kind, row_kind in KINDS.items() if objective in row_kind.objectives)
    if not found:
        raise ValueError(f"no kind of rows is known for the objective {objective!r}")
    return found
