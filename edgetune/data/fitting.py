"""Fit rows to a chat template: put tool calls and reasoning where it reads them, and count the keys it does not render.

Whether a template renders something is found by rendering with and without it, so no template needs to be known.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from edgetune.data.chat import ChatTemplate
from edgetune.data.formats import ChatRow
from edgetune.data.messages import LAYOUTS, Conversation
from edgetune.data.nested_keys import key_paths, unrendered_keys
from edgetune.data.problems import RowProblem
from edgetune.data.spelling import spell_as_read
from edgetune.data.thoughts import opens_thought
from edgetune.errors import DataError
from edgetune_converters.chat_template import REASONING_KEYS

SHOWN_KEYS = 20


@dataclass
class KeyUsage:
    """Keys that are neither rendered nor used: label -> [number of rows, place of the first]."""

    unused: dict[str, tuple[int, str]] = field(default_factory=dict)
    nested: dict[frozenset[str], list[str]] = field(default_factory=dict)
    """Kinds of keys within tools, calls and documents -> labels of those that the template does not render."""

    def add(self, label: str, place: str, rows: int = 1) -> None:
        """Count `rows` more rows with an unused key."""
        count, first = self.unused.get(label, (0, place))
        self.unused[label] = (count + rows, first)

    def merge(self, others: Iterable[KeyUsage]) -> KeyUsage:
        """Return the counts of this and others."""
        result = KeyUsage(dict(self.unused))
        for other in others:
            for label, (count, place) in other.unused.items():
                result.add(label, place, count)
        return result

    def describe(self) -> list[str]:
        """Return one line for each key: its label, the number of rows, and an example."""
        lines = [
            f"{label}: {count} row{'s' if count > 1 else ''}" + (f", for example {place}" if place else "")
            for label, (count, place) in sorted(self.unused.items(), key=lambda item: -item[1][0])
        ]
        rest = len(lines) - SHOWN_KEYS
        return [*lines[:SHOWN_KEYS], *([f"and {rest} more keys"] if rest > 0 else [])]


def fit_to_template(template: ChatTemplate, row: ChatRow, usage: KeyUsage) -> ChatRow:
    """Return the row as it is rendered, and count its unused keys.

    Raises:
        RowProblem: If a part of the row that is trained on would vanish.
        DataError: If the template refuses the row.
    """
    row, unread_options = _keep_read_options(template, row)
    template = template.with_options(row.options)
    row = _place_calls(template, row)
    row = _place_reasoning(template, row)
    row = spell_as_read(template, row)
    unrendered = _unrendered(template, row)
    labels = [*row.unread, *unread_options, *unrendered, *_unrendered_within(template, row, unrendered, usage.nested)]
    for label in labels:
        usage.add(label, row.place)
    return row


def _keep_read_options(template: ChatTemplate, row: ChatRow) -> tuple[ChatRow, list[str]]:
    """Remove the template options that the template does not read, and return their labels."""
    if not row.options:
        return row, []
    read = {"documents", *template.option_names}
    labels = [
        f"chat_template_kwargs.{name}, which the chat template does not read"
        for name in row.options
        if name not in read
    ]
    kept = {name: value for name, value in row.options.items() if name in read}
    if "documents" in kept:
        others = {name: value for name, value in kept.items() if name != "documents"}
        whole = _render(template.with_options(kept), row.messages, row.tools)
        if whole == _render(template.with_options(others), row.messages, row.tools):
            kept = others
            labels.append("documents, which the chat template does not render")
    return replace(row, options=kept), labels


def _place_calls(template: ChatTemplate, row: ChatRow) -> ChatRow:
    """Turn calls that are spelled in contents into `tool_calls`, if the template renders these."""
    for index, calls in row.calls.items():
        changed = {**row.messages[index], "content": "", "tool_calls": calls}
        without = {**row.messages[index], "content": ""}
        if _differ(template, row, index, changed, without):
            row = replace(row, messages=[*row.messages[:index], changed, *row.messages[index + 1 :]])
    return row


def _place_reasoning(template: ChatTemplate, row: ChatRow) -> ChatRow:
    """Put reasoning that was a part of a content under the key that the template reads."""
    for index, text in row.reasoning.items():
        message = row.messages[index]
        changed = next(
            (new for key in REASONING_KEYS if _differ(template, row, index, new := {**message, key: text}, message)),
            None,
        )
        if changed is None:
            raise RowProblem(
                f"message {index + 1} has a part of the type reasoning, which the chat template does not render"
            )
        row = replace(row, messages=[*row.messages[:index], changed, *row.messages[index + 1 :]])
    return row


def _differ(template: ChatTemplate, row: ChatRow, index: int, one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the template renders two variants of a message and renders them differently."""
    before = row.messages[:index]
    try:
        return template.render([*before, one], tools=row.tools) != template.render([*before, other], tools=row.tools)
    except DataError:
        return False


def _unrendered(template: ChatTemplate, row: ChatRow) -> list[str]:
    """Return the labels of the keys of messages, and of the tools, that the template does not render."""
    keys = sorted({key for message in row.messages for key in message} - {"role", "content"})
    labels = [*keys, *(["tools"] if row.tools else [])]
    if not labels:
        return []
    whole = template.render(row.messages, tools=row.tools)
    if len(labels) == 1 and whole != _render(template, _without(row.messages, keys), None):
        return []
    found = []
    if row.tools and whole == _render(template, row.messages, None):
        found.append("tools, which the chat template does not render")
    for key in keys:
        last = max(i for i, message in enumerate(row.messages) if key in message)
        # templates that rewrite history render some keys in the last message only
        part = row.messages[: last + 1]
        shown = whole if last + 1 == len(row.messages) else _render(template, part, row.tools)
        if whole != _render(template, _without(row.messages, [key]), row.tools) or (
            last + 1 < len(row.messages) and shown != _render(template, _without(part, [key]), row.tools)
        ):
            continue
        if key in REASONING_KEYS and all(_has_twin(message, key) for message in part if key in message):
            rest = _render(template, _without(part, REASONING_KEYS), row.tools)
            if rest != shown:
                continue
        if key in REASONING_KEYS and _fills_thought(template, part, row.tools):
            continue
        found.append(f"{key} of a message, which the chat template does not render")
        if key == "tool_calls" and any(
            m["role"] == "assistant" and not m.get("content") and m[key] for m in part if key in m
        ):
            raise RowProblem(
                "the chat template does not render tool_calls, so an empty answer would be trained on; "
                "use a template with tools (data.chat_template), or write the call as the content"
            )
    return found


def _unrendered_within(
    template: ChatTemplate, row: ChatRow, unrendered: Collection[str], known: dict[frozenset[str], list[str]]
) -> list[str]:
    """Return the labels of keys within rendered tools, calls and documents that are not rendered.

    Rows with the same kinds of keys have the same labels, so each set is rendered once.
    """
    calls = [message["tool_calls"] for message in row.messages if message.get("tool_calls")]
    parts: dict[str, Any] = {"tools": row.tools, "tool_calls": calls, "documents": row.options.get("documents")}
    missing = {label.partition(",")[0].partition(" ")[0] for label in unrendered}
    parts = {name: value for name, value in parts.items() if value and name not in missing}
    if not parts:
        return []
    kinds = frozenset(f"{name}:{path}" for name, value in parts.items() for path in key_paths(value))
    if kinds in known:
        return known[kinds]
    whole = template.render(row.messages, tools=row.tools)

    def is_same(name: str, value: Any) -> bool:
        if name == "tools":
            return _render(template, row.messages, value) == whole
        if name == "documents":
            return _render(template.with_options({name: value}), row.messages, row.tools) == whole
        changed = iter(value)
        messages = [{**m, name: next(changed)} if m.get(name) else m for m in row.messages]
        return _render(template, messages, row.tools) == whole

    labels = [
        f"{name}[].{key}, which the chat template does not render"
        for name, value in parts.items()
        for key in unrendered_keys(value, partial(is_same, name))
    ]
    if len(known) < LAYOUTS:
        known[kinds] = labels
    return labels


def _fills_thought(template: ChatTemplate, part: Conversation, tools: Any) -> bool:
    """Whether reasoning of the last message is put into the thought that its prompt opens (thoughts.py)."""
    try:
        return opens_thought(template.render(part[:-1], add_generation_prompt=True, tools=tools))
    except DataError:
        return False


def _has_twin(message: Mapping[str, Any], key: str) -> bool:
    """Whether another key of the message holds the same reasoning."""
    return any(message.get(other) == message[key] for other in REASONING_KEYS if other != key)


def _without(messages: Conversation, keys: Iterable[str]) -> Conversation:
    return [{name: value for name, value in message.items() if name not in keys} for message in messages]


def _render(template: ChatTemplate, messages: Conversation, tools: Any) -> str | None:
    try:
        return template.render(messages, tools=tools)
    except DataError:
        return None
