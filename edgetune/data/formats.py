"""From rows of the common fine-tuning formats to conversations (lists of {"role", "content"} messages).

A format is a row of the table FORMATS: how its keys are recognized, and how a row is converted. All problems of a file
are reported together, each with its row number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgetune.errors import DataError

Conversation = list[dict[str, str]]
"""Messages in order, each {"role": "system" | "user" | "assistant" | "tool", "content": text}."""

SHOWN_PROBLEMS = 20

_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant",  # LLaMA-Factory's sharegpt: a tool call that the model writes, as JSON text
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip

_PROMPT_COMPLETION_KEYS = (
    ("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response"),
    ("input", "output"),
)  # fmt: skip


class RowProblem(ValueError):
    """A problem of one row; the caller adds the place of the row."""


@dataclass(frozen=True)
class RowFormat:
    """A format of rows."""

    keys: str
    """Its keys, for the message about a row in no known format."""
    recognize: Callable[[Mapping[str, Any]], bool]
    convert: Callable[[Mapping[str, Any]], Conversation]


def detect_format(row: Mapping[str, Any]) -> str | None:
    """Return the first format that matches the keys of the row."""
    row = _present(row)
    return next((name for name, form in FORMATS.items() if form.recognize(row)), None)


def to_conversation(row: Any, form: str = "auto") -> Conversation:
    """Convert a row to a conversation with at least one assistant turn. Raises RowProblem."""
    if not isinstance(row, Mapping):
        raise RowProblem(f"not an object but {type(row).__name__}")
    row = _present(row)
    name = detect_format(row) if form == "auto" else form if FORMATS[form].recognize(row) else None
    if name is None:
        looked_for = FORMATS.values() if form == "auto" else [FORMATS[form]]
        raise RowProblem(
            f"in no known format; its keys are {', '.join(map(str, row)) or 'none'}; looked for "
            + "; or ".join(each.keys for each in looked_for)
        )
    conversation = FORMATS[name].convert(row)
    if not any(message["role"] == "assistant" for message in conversation):
        raise RowProblem("has no assistant message, so there is nothing to learn from it")
    return conversation


def _present(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row without nulls, which stand for absent columns in tables."""
    return {key: value for key, value in row.items() if value is not None}


def convert_rows(rows: Iterable[tuple[str, Any]], form: str = "auto") -> list[Conversation]:
    """Convert all rows, given as (place, row). Raises one DataError for all their problems."""
    problems = RowProblems()
    conversations: list[Conversation] = []
    for place, row in rows:
        if isinstance(row, RowProblem):
            problems.add(f"{place}: {row}")
            continue
        try:
            conversations.append(to_conversation(row, form))
        except RowProblem as problem:
            problems.add(f"{place}: {problem}")
    problems.raise_if_any()
    return conversations


@dataclass
class RowProblems:
    """Problems of a data file: the first ones in words, and the number of all."""

    shown: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, problem: str) -> None:
        """Add one; after the first SHOWN_PROBLEMS only count it."""
        self.count += 1
        if len(self.shown) < SHOWN_PROBLEMS:
            self.shown.append(problem)

    def raise_if_any(self) -> None:
        """Raise one DataError for all of them."""
        if self.count:
            hint = "Correct or remove these rows; docs/train.md lists the formats"
            raise DataError.of_many("problems in the data", self.shown, hint, total=self.count)


def _messages(row: Mapping[str, Any]) -> Conversation:
    return [_message(each, "role", "content") for each in _turn_list(row, "messages")]


def _sharegpt(row: Mapping[str, Any]) -> Conversation:
    key = "conversations" if "conversations" in row else "conversation"
    turns = [_message(each, "from", "value") for each in _turn_list(row, key)]
    return [*_system(row), *turns]


def _alpaca(row: Mapping[str, Any]) -> Conversation:
    instruction, extra = _text(row, "instruction"), _text(row, "input", default="")
    conversation = _system(row)
    for pair in row.get("history") or []:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise RowProblem("history is not a list of [instruction, output] pairs")
        conversation += _exchange(str(pair[0]), str(pair[1]))
    return conversation + _exchange(f"{instruction}\n{extra}" if extra else instruction, _text(row, "output"))


def _prompt_completion(row: Mapping[str, Any]) -> Conversation:
    prompt_key, completion_key = next(pair for pair in _PROMPT_COMPLETION_KEYS if pair[0] in row and pair[1] in row)
    return [*_system(row), *_side(row, prompt_key, "user"), *_side(row, completion_key, "assistant")]


def _side(row: Mapping[str, Any], key: str, role: str) -> Conversation:
    """Convert a prompt or completion: one text, or a list of messages as TRL writes them."""
    if isinstance(row[key], list):
        return [_message(each, "role", "content") for each in _turn_list(row, key)]
    return [{"role": role, "content": _text(row, key)}]


def _exchange(user: str, assistant: str) -> Conversation:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _system(row: Mapping[str, Any]) -> Conversation:
    text = _text(row, "system", default="")
    return [{"role": "system", "content": text}] if text else []


def _turn_list(row: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    turns = row[key]
    if not isinstance(turns, list) or not turns:
        raise RowProblem(f"{key} is not a list of messages" if turns else f"{key} is empty")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping):
            raise RowProblem(f"message {number} of {key} is not an object")
    return turns


def _message(turn: Mapping[str, Any], role_key: str, text_key: str) -> dict[str, str]:
    role = turn.get(role_key)
    if role not in _ROLES:
        raise RowProblem(f"{role_key} is {role!r}; known are {', '.join(_ROLES)}")
    return {"role": _ROLES[role], "content": _text(turn, text_key)}


def _text(row: Mapping[str, Any], key: str, default: str | None = None) -> str:
    """Return a text, joined text parts ([{"type": "text", "text": ...}]), or the JSON of a number or boolean."""
    value = row.get(key, default)
    if value is None:
        value = default
    if isinstance(value, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in value):
        return "".join(str(part.get("text", "")) for part in value)
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if not isinstance(value, str):
        raise RowProblem(f"{key} is missing" if value is None else f"{key} is not a text but {type(value).__name__}")
    return value


def _has_pair(row: Mapping[str, Any]) -> bool:
    return any(prompt in row and completion in row for prompt, completion in _PROMPT_COMPLETION_KEYS)


FORMATS: Mapping[str, RowFormat] = {
    "messages": RowFormat('messages [{"role", "content"}]', lambda row: "messages" in row, _messages),
    "sharegpt": RowFormat(
        'sharegpt conversations [{"from", "value"}]',
        lambda row: "conversations" in row or "conversation" in row,
        _sharegpt,
    ),
    "alpaca": RowFormat(
        "alpaca instruction + output [+ input, system, history]",
        lambda row: "instruction" in row and "output" in row,
        _alpaca,
    ),
    "prompt-completion": RowFormat("prompt + completion (or question + answer)", _has_pair, _prompt_completion),
}


def detect_formats(rows: Iterable[Any]) -> Iterator[str]:
    """Yield the formats of the rows, in order of first occurrence."""
    seen: set[str] = set()
    for row in rows:
        name = detect_format(row) if isinstance(row, Mapping) else None
        if name is not None and name not in seen:
            seen.add(name)
            yield name
