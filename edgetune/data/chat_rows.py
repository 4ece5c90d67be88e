"""A row of training data as the chat template and the objective need it, before it is rendered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgetune.data.messages import Conversation


@dataclass(slots=True)
class Pair:
    """The worse answer of a preference pair; the row itself ends with the better one."""

    rejected: ChatRow
    prompt: int
    """Number of messages of the shared prompt, with which both rows begin."""
    margin: float | None = None
    """By how much the better answer is better, where the row states it."""


@dataclass(slots=True)
class Label:
    """The label of the last answer of a row (KTO)."""

    desirable: bool


@dataclass(slots=True)
class Columns:
    """The other keys of a row that is a prompt, for the reward functions."""

    values: dict[str, Any]


@dataclass(slots=True)
class PlainText:
    """A document of continued pretraining; the row has no messages."""

    text: str


@dataclass(slots=True)  # frozen, it would take three times as long to create, for each of a million rows
class ChatRow:
    """A row as the chat template needs it. Do not change it; use dataclasses.replace."""

    messages: Conversation
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the tools that the template describes to the model."""
    untrained: frozenset[int] = frozenset()
    """Indices of assistant messages that the row excludes from the loss."""
    place: str = ""
    """The place of the row for messages: 'train.jsonl, line 3'."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Template options of the row alone: its `chat_template_kwargs`, and its `documents`."""
    unread: tuple[str, ...] = ()
    """Keys of the row and of its messages that no format reads."""
    calls: Mapping[int, list[dict[str, Any]]] = field(default_factory=dict)
    """Tool calls that the contents of messages spell as JSON text, by index of the message."""
    reasoning: Mapping[int, str] = field(default_factory=dict)
    """Reasoning that was a part of a content, by index of the message."""
    beside: Pair | Label | Columns | PlainText | None = None
    """What the objective reads beside the messages; None for a conversation."""
    task: str | None = None
    """The task of the row, of the key that `data.columns.task` names."""

    @property
    def answers(self) -> list[int]:
        """Indices of the assistant messages that are trained on."""
        return [i for i, m in enumerate(self.messages) if m["role"] == "assistant" and i not in self.untrained]
