"""From a message of a row to a message for the chat template, and whether it is trained on.

Keys that the template may read (tool_calls, name, reasoning_content ...) are passed on as they are. Keys that change
what is trained on are honored or refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgetune.data.problems import RowProblem

Conversation = list[dict[str, Any]]
"""Messages in order: {"role": "system" | "user" | "assistant" | "tool", "content": text}, and other keys."""

MEDIA_KEYS = ("images", "image", "videos", "video", "audios", "audio")
FLAG_KEYS = ("weight", "train", "training", "loss")
"""Keys of a message that say whether it is trained on: 1 or true (the default), 0 or false."""

_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant",  # LLaMA-Factory's sharegpt: tool calls that the model writes, as JSON text
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip

_TEXT_TYPES = (None, "text", "input_text", "output_text")
_REASONING_TYPES = ("reasoning", "thinking")
_TEXT_KEYS = ("text", "value", "content")
_MEDIA_WORDS = ("image", "audio", "video")


@dataclass(frozen=True)
class Turn:
    """A message, and what is known about it beside its keys."""

    message: dict[str, Any]
    trained: bool = True
    """False if a flag of the message excludes it from the loss."""
    calls: list[dict[str, Any]] | None = None
    """The tool calls that the content spells as JSON text (sharegpt's function_call)."""
    reasoning: str | None = None
    """The reasoning that was a part of the content, and not a key of the message."""
    unread: tuple[str, ...] = ()
    """Keys that are neither passed on nor used."""


@dataclass
class _Content:
    text: str
    reasoning: str | None = None
    unread: list[str] = field(default_factory=list)


def is_empty(value: Any) -> bool:
    """Whether a value stands for an absent one: null, "", [] or {}."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def convert_message(turn: Mapping[str, Any], role_key: str, text_key: str) -> Turn:
    """Convert a message with the given names of role and content. Raises RowProblem."""
    given = turn.get(role_key)
    if not isinstance(given, str) or given not in _ROLES:
        raise RowProblem(f"{role_key} is {given!r}; known are {', '.join(_ROLES)}")
    role = _ROLES[given]
    check_media(turn)
    if not is_empty(turn.get("train_detail")):
        raise RowProblem("train_detail marks parts of a message; edgetune trains on a turn as a whole or not at all")
    message: dict[str, Any] = {"role": role}
    handled = {role_key, text_key, "role", "content", *FLAG_KEYS, *MEDIA_KEYS, "function_call"}
    others = {key: value for key, value in turn.items() if key not in handled and value is not None}
    if "tool_calls" in others:
        others["tool_calls"] = parse_objects(others["tool_calls"], "tool_calls")
    if not is_empty(turn.get("function_call")):  # the older form of tool_calls
        others.setdefault(
            "tool_calls", [_as_call(call) for call in parse_objects(turn["function_call"], "function_call")]
        )
    value = turn.get(text_key)
    has_calls = role == "assistant" and not is_empty(others.get("tool_calls"))
    content = _Content("") if value is None and has_calls else read_content(value, text_key)
    if value is not None or not has_calls:
        message["content"] = content.text
    elif text_key in turn:
        message["content"] = None  # as transformers passes it
    flags = [_read_flag(key, turn[key]) for key in FLAG_KEYS if turn.get(key) is not None and role == "assistant"]
    unread = [key for key in ("role", "content") if key not in (role_key, text_key) and not is_empty(turn.get(key))]
    unread += [key for key in FLAG_KEYS if turn.get(key) is not None and role != "assistant"]
    calls = _parse_call_text(content.text) if given == "function_call" else None
    return Turn(message | others, all(flags), calls, content.reasoning, (*unread, *content.unread))


def check_media(holder: Mapping[str, Any]) -> None:
    """Raise RowProblem for a row or message that comes with pictures, sound or film."""
    for key in MEDIA_KEYS:
        if not is_empty(holder.get(key)):
            raise RowProblem(f"{key} is not empty, and edgetune trains on text only")


def read_content(value: Any, key: str) -> _Content:
    """Read a text, a list of parts, or a number or boolean (as JSON). Raises RowProblem."""
    if isinstance(value, str):
        return _Content(value)
    if isinstance(value, bool | int | float):
        return _Content(json.dumps(value))
    if value is None:
        raise RowProblem(f"{key} is missing")
    if not isinstance(value, list):
        raise RowProblem(f"{key} is not a text but {type(value).__name__}; write it as JSON text")
    texts: list[str] = []
    reasoning: list[str] = []
    result = _Content("")
    for number, part in enumerate(value, 1):
        where = f"part {number} of {key}"
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            raise RowProblem(f"{where} is neither a text nor an object but {type(part).__name__}")
        kind = part.get("type")
        keys = _TEXT_KEYS if kind in _TEXT_TYPES else (*_TEXT_KEYS, *_REASONING_TYPES)
        _check_type(kind, where)
        (texts if kind in _TEXT_TYPES else reasoning).append(_part_text(part, keys, where))
        result.unread += [
            f"{key}[].{name}" for name in part if name not in ("type", *keys) and not is_empty(part[name])
        ]
    result.text = "".join(texts)
    result.reasoning = "".join(reasoning) if reasoning else None
    return result


def _check_type(kind: Any, where: str) -> None:
    if kind in _TEXT_TYPES or kind in _REASONING_TYPES:
        return
    if isinstance(kind, str) and any(word in kind for word in _MEDIA_WORDS):
        raise RowProblem(f"{where} is of the type {kind}, and edgetune trains on text only")
    known = ", ".join(name for name in (*_TEXT_TYPES, *_REASONING_TYPES) if name)
    raise RowProblem(f"{where} is of the type {kind}, which edgetune does not read; known are {known}")


def _part_text(part: Mapping[str, Any], keys: tuple[str, ...], where: str) -> str:
    found = [part[key] for key in keys if part.get(key) is not None]
    if not found:
        raise RowProblem(f"{where} has no text; its keys are {', '.join(map(str, part)) or 'none'}")
    if not isinstance(found[0], str) or any(text != found[0] for text in found):
        raise RowProblem(f"{where} has no single text under one of {', '.join(keys)}")
    return found[0]


def parse_objects(value: Any, key: str) -> list[dict[str, Any]]:
    """Return a list of objects given as such, as one object, or as JSON text of either. Raises RowProblem."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except json.JSONDecodeError as error:
            raise RowProblem(f"{key} is a text that is not JSON: {error.msg}") from None
    found = [value] if isinstance(value, Mapping) else [] if value is None else value
    if not isinstance(found, list):
        raise RowProblem(f"{key} is not a list of objects but {type(found).__name__}")
    result = []
    for each in found:
        if isinstance(each, str):
            result += parse_objects(each, key)
        elif isinstance(each, Mapping):
            result.append(dict(each))
        else:
            raise RowProblem(f"{key} is not a list of objects: it holds {type(each).__name__}")
    return result


def _as_call(function: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": dict(function)}


def _parse_call_text(text: str) -> list[dict[str, Any]] | None:
    """Return the calls that a text spells as JSON: {"name", "arguments"} or a list of these; None for anything else."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return None
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return None
    return [_as_call(call) for call in calls]


def _read_flag(key: str, value: Any) -> bool:
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise RowProblem(f"{key} of a message is {value!r}; edgetune trains on a turn (1, true) or does not (0, false)")


def read_row_weight(value: Any) -> bool:
    """Return whether a row with this `weight` is trained on. Raises RowProblem for a weight other than 0 and 1."""
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise RowProblem(f"weight of the row is {value!r}; edgetune trains on a row (1) or does not (0)")


def check_characters(value: Any) -> None:
    """Raise RowProblem for half a character (a lone UTF-16 surrogate) in the texts and keys of a value."""
    if isinstance(value, str):
        if value.isascii():
            return
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(value[error.start])
            raise RowProblem(
                f"holds half a character (U+{code:04X}, a lone UTF-16 surrogate), which is no text; it was probably cut"
            ) from None
    elif isinstance(value, Mapping):
        for key, each in value.items():
            check_characters(key)
            check_characters(each)
    elif isinstance(value, list | tuple):
        for each in value:
            check_characters(each)
