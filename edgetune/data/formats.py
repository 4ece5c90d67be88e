"""From rows of the common fine-tuning formats to conversations.

A format is a row of the table FORMATS: how its keys are recognized, and how a row is converted. All problems of a file
are reported together, each with its row number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from edgetune.data.messages import (
    Conversation,
    Turn,
    check_characters,
    check_media,
    convert_message,
    is_empty,
    parse_objects,
    read_content,
    read_row_weight,
)
from edgetune.data.problems import RowProblem, RowProblems
from edgetune_converters.chat_template import RESERVED

__all__ = ["FORMATS", "ChatRow", "Conversation", "convert_rows", "detect_format", "detect_formats", "to_chat_row"]

_PROMPT_COMPLETION_KEYS = (
    ("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response"),
    ("input", "output"),
)  # fmt: skip


@dataclass(frozen=True)
class ChatRow:
    """A row as the chat template needs it."""

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

    @property
    def answers(self) -> list[int]:
        """Indices of the assistant messages that are trained on."""
        return [i for i, m in enumerate(self.messages) if m["role"] == "assistant" and i not in self.untrained]


@dataclass(frozen=True)
class RowFormat:
    """A format of rows."""

    keys: str
    """Its keys, for the message about a row in no known format."""
    recognize: Callable[[Mapping[str, Any]], bool]
    convert: Callable[[Mapping[str, Any]], list[Turn]]


class _ReadRow(dict[str, Any]):
    """A row that records which of its keys are read."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        super().__init__(row)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


def detect_format(row: Mapping[str, Any]) -> str | None:
    """Return the first format that matches the keys of the row."""
    row = _present(row)
    return next((name for name, form in FORMATS.items() if form.recognize(row)), None)


def to_chat_row(row: Any, form: str = "auto", place: str = "") -> ChatRow:
    """Convert a row to a conversation with at least one assistant message. Raises RowProblem."""
    if not isinstance(row, Mapping):
        raise RowProblem(f"not an object but {type(row).__name__}")
    present = _present(row)
    _refuse_other_objectives(present)
    read = _ReadRow(present)
    name = detect_format(read) if form == "auto" else form if FORMATS[form].recognize(read) else None
    if name is None:
        looked_for = FORMATS.values() if form == "auto" else [FORMATS[form]]
        raise RowProblem(
            f"in no known format; its keys are {', '.join(map(str, read)) or 'none'}; looked for "
            + "; or ".join(each.keys for each in looked_for)
        )
    turns = FORMATS[name].convert(read)
    if not any(turn.message["role"] == "assistant" for turn in turns):
        raise RowProblem("has no assistant message, so there is nothing to learn from it")
    row_is_trained = "weight" not in read or read_row_weight(read["weight"])
    tools, options = _tools(read), _options(read)
    messages = [turn.message for turn in turns]
    check_characters(messages)
    check_characters(tools)
    check_characters(options)
    unread = [key for key, value in read.items() if key not in read.read and not is_empty(value)]
    unread += [f"{key} of a message" for key in dict.fromkeys(key for turn in turns for key in turn.unread)]
    return ChatRow(
        messages,
        tools,
        frozenset(
            i for i, t in enumerate(turns) if t.message["role"] == "assistant" and not (t.trained and row_is_trained)
        ),
        place,
        options,
        tuple(unread),
        {i: turn.calls for i, turn in enumerate(turns) if turn.calls},
        {i: turn.reasoning for i, turn in enumerate(turns) if turn.reasoning},
    )


def _refuse_other_objectives(row: Mapping[str, Any]) -> None:
    """Raise RowProblem for keys that ask for another kind of training."""
    check_media(row)
    pair = [key for key in ("chosen", "rejected") if not is_empty(row.get(key))]
    if pair:
        raise RowProblem(
            f"a preference row ({', '.join(pair)}); edgetune trains on one answer: give it as the completion, alone"
        )
    for key in ("label", "kto_tag"):
        if isinstance(row.get(key), bool):
            raise RowProblem(
                f"{key} is {json.dumps(row[key])}: a rated row (KTO), and edgetune does not learn from bad answers; "
                f"keep the good rows, without the key"
            )
    if not is_empty(row.get("train_detail")):
        raise RowProblem("train_detail marks parts of a message; edgetune trains on a turn as a whole or not at all")


def _tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the tools of a row; `functions` is the older form. None for an empty list."""
    if "tools" in row:
        return parse_objects(row["tools"], "tools") or None
    functions = parse_objects(row["functions"], "functions") if "functions" in row else []
    return [{"type": "function", "function": each} for each in functions] or None


def _options(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template options of a row, without nulls, which stand for absent fields in tables."""
    value = row.get("chat_template_kwargs")
    if isinstance(value, str):
        with suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, Mapping | None):
        raise RowProblem("chat_template_kwargs is not an object of template options")
    options = {} if value is None else {key: each for key, each in value.items() if each is not None}
    reserved = next((name for name in RESERVED if name in options), None)
    if reserved:
        raise RowProblem(f"chat_template_kwargs sets {reserved}, which only the row itself can set")
    has_documents = any(key == "documents" and _are_objects(value) for key, value in row.items())
    return {**options, "documents": row["documents"]} if has_documents else options


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, Mapping) for each in value)


def _present(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row without nulls, which stand for absent columns in tables."""
    return {key: value for key, value in row.items() if value is not None}


def convert_rows(
    rows: Iterable[tuple[str, Any]], form: str = "auto", problems: RowProblems | None = None
) -> list[ChatRow]:
    """Convert all rows, given as (place, row). Without `problems`, raise one DataError for all problems."""
    found = RowProblems() if problems is None else problems
    result: list[ChatRow] = []
    for place, row in rows:
        if isinstance(row, RowProblem):
            found.add(place, str(row))
            continue
        try:
            result.append(to_chat_row(row, form, place))
        except RowProblem as problem:
            found.add(place, str(problem))
    if problems is None:
        found.raise_if_any()
    return result


def _messages(row: Mapping[str, Any]) -> list[Turn]:
    return _turns(row, "messages", "role", "content")


def _sharegpt(row: Mapping[str, Any]) -> list[Turn]:
    key = "conversations" if "conversations" in row else "conversation"
    return [*_system(row), *_turns(row, key, "from", "value")]


def _alpaca(row: Mapping[str, Any]) -> list[Turn]:
    instruction, extra = _text(row, "instruction"), _text(row, "input", default="")
    conversation = _system(row)
    for pair in row.get("history") or []:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise RowProblem("history is not a list of [instruction, output] pairs")
        conversation += _exchange(str(pair[0]), str(pair[1]))
    return conversation + _exchange(f"{instruction}\n{extra}" if extra else instruction, _text(row, "output"))


def _prompt_completion(row: Mapping[str, Any]) -> list[Turn]:
    prompt_key, completion_key = next(pair for pair in _PROMPT_COMPLETION_KEYS if pair[0] in row and pair[1] in row)
    return [*_system(row), *_side(row, prompt_key, "user"), *_side(row, completion_key, "assistant")]


def _side(row: Mapping[str, Any], key: str, role: str) -> list[Turn]:
    """Convert a prompt or completion: one text, or a list of messages as TRL writes them."""
    if isinstance(row[key], list):
        return _turns(row, key, "role", "content")
    return [_turn(role, _text(row, key))]


def _exchange(user: str, assistant: str) -> list[Turn]:
    return [_turn("user", user), _turn("assistant", assistant)]


def _system(row: Mapping[str, Any]) -> list[Turn]:
    text = _text(row, "system", default="")
    return [_turn("system", text)] if text else []


def _turn(role: str, text: str) -> Turn:
    return Turn({"role": role, "content": text})


def _turns(row: Mapping[str, Any], key: str, role_key: str, text_key: str) -> list[Turn]:
    given = row[key]
    if not isinstance(given, list) or not given:
        raise RowProblem(f"{key} is not a list of messages" if given else f"{key} is empty")
    turns = []
    for number, each in enumerate(given, 1):
        if not isinstance(each, Mapping):
            raise RowProblem(f"message {number} of {key} is not an object")
        try:
            turns.append(convert_message(each, role_key, text_key))
        except RowProblem as problem:
            raise RowProblem(f"message {number}: {problem}") from None
    return turns


def _text(row: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = row.get(key)
    content = read_content(default if value is None else value, key)
    if content.reasoning is not None:
        raise RowProblem(f"{key} has a part of the type reasoning, which only messages can have")
    return content.text


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
