"""From a message of a row to a message for the chat template, and whether it is trained on.

Keys that the template may read (tool_calls, name, reasoning_content ...) are passed on as they are. Keys that change
what is trained on are honored or refused.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgetune.data.key_names import (
    CALL_ROLES,
    COMPLETION_KEYS,
    CONTENT_KEYS,
    FLAG_KEYS,
    MASK_KEYS,
    MEDIA_KEYS,
    PROMPT_KEYS,
    ROLE_KEYS,
    ROLES,
    SYSTEM_KEYS,
    KeyFinder,
    fold,
)
from edgetune.data.problems import RowProblem

Conversation = list[dict[str, Any]]
"""Messages in order: {"role": "system" | "user" | "assistant" | "tool", "content": text}, and other keys."""

ASSISTANT = "assistant"
_as_text = json.JSONEncoder(ensure_ascii=False, default=str).encode
LAYOUTS = 10_000
"""Sets of keys whose meaning is kept."""
_FLAG_TEXTS = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}
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
class Content:
    """The text of a content, and what else its parts hold."""

    text: str
    reasoning: str | None = None
    unread: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _MessageLayout:
    """What the keys of a message mean."""

    roles: list[str]
    contents: list[str]
    exchange: list[tuple[str, str]]
    """(role, key) of an object with a key for each role."""
    flags: list[str]
    media: list[str]
    masks: list[str]
    others: list[str]
    """Keys that go to the template, if they are neither role nor content."""


def is_empty(value: Any) -> bool:
    """Whether a value stands for an absent one: null, "", [] or {}."""
    return value is None or (isinstance(value, str | list | dict) and not value)


class MessageReader:
    """Converts messages. Which key means what is found once for each set of keys."""

    def __init__(
        self, role_key: str | None = None, content_key: str | None = None, roles: Mapping[str, str] | None = None
    ) -> None:
        """Read messages with the usual names, and with those of data.columns and data.roles first."""
        self._role_key = role_key
        self._content_key = content_key
        self._roles = {name: role for role, names in ROLES.items() for name in map(fold, names)}
        self._roles |= {fold(name): ASSISTANT for name in CALL_ROLES}
        given = {fold(name): role for name, role in (roles or {}).items()}
        self._roles |= {name: ASSISTANT if role in CALL_ROLES else role for name, role in given.items()}
        self._call_roles = {fold(name) for name in CALL_ROLES} - given.keys()
        self._call_roles |= {name for name, role in given.items() if role in CALL_ROLES}
        self._plain_roles: dict[str, str] = {}
        """Roles as messages spell them -> role."""
        self._plain_keys: dict[tuple[str, ...], tuple[str, str]] = {}
        """Keys of a message with a role, a text and nothing else -> the keys of the two."""
        self._layouts: dict[tuple[str, ...], _MessageLayout] = {}
        self.seen: set[str] = set()
        """The keys of data.columns that a message had."""

    @property
    def known_keys(self) -> list[str]:
        """The keys of the messages."""
        return [*dict.fromkeys(key for layout in self._layouts for key in layout)]

    def read_plain(self, given: list[Any]) -> Conversation | None:
        """Return messages of a known role and a text and nothing else; None for others, which `read` reads.

        This is the path of most rows, and several times as fast.
        """
        plain_keys, plain_roles = self._plain_keys, self._plain_roles
        messages: Conversation = []
        trained = False
        try:
            for message in given:
                role_key, text_key = plain_keys[tuple(message)]
                role, text = plain_roles[message[role_key]], message[text_key]
                if type(text) is not str or not (text.isascii() or is_unicode(text)):
                    return None
                trained = trained or role == ASSISTANT
                messages.append({"role": role, "content": text})
        except (KeyError, TypeError):  # other keys or another role, and what is no message
            return None
        return messages if trained else None

    def read(self, message: Mapping[str, Any]) -> list[Turn]:
        """Convert a message, or an exchange such as {"human": ..., "assistant": ...}. Raises RowProblem."""
        layout = self._layout(tuple(message))
        if not layout.roles and layout.exchange:
            return self._read_exchange(message, layout)
        return [self._read_message(message, layout)]

    def has_role(self, message: Mapping[str, Any]) -> bool:
        """Whether an object has a key for a role, or one key for each role."""
        layout = self._layout(tuple(message))
        return bool(layout.roles or layout.exchange)

    def is_message(self, value: Any) -> bool:
        """Whether a value is an object with a known role."""
        if not isinstance(value, Mapping):
            return False
        return any(self._known_role(value[key]) is not None for key in self._layout(tuple(value)).roles)

    def _layout(self, keys: tuple[str, ...]) -> _MessageLayout:
        layout = self._layouts.get(keys)
        if layout is None:
            if len(self._layouts) >= LAYOUTS:  # rows whose keys are data would fill the memory
                self._layouts.clear()
                self._plain_keys.clear()
            layout = self._layouts[keys] = self._find_layout(keys)
            if len(keys) == 2 and len(layout.roles) == len(layout.contents) == 1 and layout.roles != layout.contents:
                self._plain_keys[keys] = (layout.roles[0], layout.contents[0])
        return layout

    def _find_layout(self, keys: tuple[str, ...]) -> _MessageLayout:
        finder = KeyFinder(keys)
        roles, contents = finder.all(ROLE_KEYS), finder.all(CONTENT_KEYS)
        for mapped, found in ((self._role_key, roles), (self._content_key, contents)):
            if mapped in keys:
                self.seen.add(mapped)
                found[:] = [mapped]
        exchange: list[tuple[str, str]] = []
        if not roles:
            names = (("system", SYSTEM_KEYS), ("user", PROMPT_KEYS), (ASSISTANT, COMPLETION_KEYS))
            exchange = [(role, key) for role, each in names if (key := finder.first(each)) is not None]
        flags = finder.all(FLAG_KEYS)
        special = {*flags, *finder.all(MEDIA_KEYS), *finder.all(MASK_KEYS), "function_call"}
        return _MessageLayout(
            roles, contents, exchange, flags, finder.all(MEDIA_KEYS), finder.all(MASK_KEYS),
            [key for key in keys if key not in special],
        )  # fmt: skip

    def _known_role(self, given: Any) -> str | None:
        if not isinstance(given, str):
            return None
        name = fold(given)
        role = self._roles.get(name)
        if role is not None and name not in self._call_roles and len(self._plain_roles) < LAYOUTS:
            self._plain_roles[given] = role
        return role

    def _choose_role(self, message: Mapping[str, Any], layout: _MessageLayout) -> tuple[str, str]:
        """Return (key, role) of the first key with a known role."""
        for key in layout.roles:
            role = self._known_role(message[key])
            if role is not None:
                return key, role
        given = [key for key in layout.roles if message[key] is not None]
        if not given:
            raise RowProblem(
                f"has no role; its keys are {', '.join(map(str, message)) or 'none'}, and known for a role are "
                + ", ".join(ROLE_KEYS),
                "Name the key with data.columns: {role: KEY}",
            )
        known = ", ".join(name for names in ROLES.values() for name in names)
        raise RowProblem(
            f"{given[0]} is {message[given[0]]!r}; known are {known}",
            "Name its meaning with data.roles, such as data.roles: {caller: user, clerk: assistant}",
        )

    def _read_message(self, turn: Mapping[str, Any], layout: _MessageLayout) -> Turn:
        role_key, role = self._choose_role(turn, layout)
        contents = [key for key in layout.contents if key != role_key]
        text_key = next((key for key in contents if turn[key] is not None), contents[0] if contents else "content")
        _check_special(turn, layout)
        message: dict[str, Any] = {"role": role}
        handled = {role_key, text_key, "role", "content"}
        others = {key: turn[key] for key in layout.others if key not in handled and turn[key] is not None}
        if "tool_calls" in others:
            others["tool_calls"] = parse_objects(others["tool_calls"], "tool_calls")
        older = not is_empty(turn.get("function_call"))  # the older form of tool_calls
        replaced = older and not is_empty(others.get("tool_calls"))
        if older and not replaced:
            others["tool_calls"] = [as_call(call) for call in parse_objects(turn["function_call"], "function_call")]
        value = turn.get(text_key)
        has_calls = role == ASSISTANT and not is_empty(others.get("tool_calls"))
        content = Content("") if value is None and has_calls else read_content(value, text_key)
        if value is not None or not has_calls:
            message["content"] = content.text
        elif text_key in turn:
            message["content"] = None  # as transformers passes it
        unread = [key for key in ("role", "content") if key not in (role_key, text_key) and not is_empty(turn.get(key))]
        unread += ["function_call"] if replaced else []
        if role != ASSISTANT:
            unread += [key for key in layout.flags if turn[key] is not None]
        calls = parse_call_text(content.text) if fold(turn[role_key]) in self._call_roles else None
        trained = role != ASSISTANT or _read_flags(turn, layout.flags)
        return Turn(message | others, trained, calls, content.reasoning, (*unread, *content.unread))

    def _read_exchange(self, message: Mapping[str, Any], layout: _MessageLayout) -> list[Turn]:
        """Convert an object with a key for each role."""
        _check_special(message, layout)
        result: list[Turn] = []
        used = {key for _, key in layout.exchange}
        unread = [key for key in layout.others if key not in used and not is_empty(message[key])]
        if all(role != ASSISTANT or message[key] is None for role, key in layout.exchange):
            unread += [key for key in layout.flags if message[key] is not None]
        if not is_empty(message.get("function_call")):
            unread.append("function_call")
        for role, key in layout.exchange:
            if message[key] is None or (role == "system" and is_empty(message[key])):
                continue
            content = read_content(message[key], key)
            trained = role != ASSISTANT or _read_flags(message, layout.flags)
            found = {"role": role, "content": content.text}
            result.append(Turn(found, trained, None, content.reasoning, (*unread, *content.unread)))
            unread = []
        if not result:
            raise RowProblem(f"{' and '.join(key for _, key in layout.exchange)} is missing")
        return result


def _check_special(message: Mapping[str, Any], layout: _MessageLayout) -> None:
    for key in layout.media:
        check_media(key, message[key])
    for key in layout.masks:
        check_mask(key, message[key])


def _read_flags(message: Mapping[str, Any], keys: Sequence[str]) -> bool:
    trained = [read_flag(key, message[key], "a message") for key in keys if message[key] is not None]
    return all(trained)


def check_mask(key: str, value: Any) -> None:
    """Raise RowProblem for a key that marks parts of a row or message as trained on."""
    if not is_empty(value) and not (isinstance(value, str) and ROLES["user"].count(value.casefold())):
        raise RowProblem(
            f"{key} marks parts of a message; edgetune trains on a turn as a whole or not at all "
            "(weight, train: 1 or 0 of a message)"
        )


def check_media(key: str, value: Any) -> None:
    """Raise RowProblem for pictures, sound or film."""
    if not is_empty(value):
        raise RowProblem(f"{key} is not empty, and edgetune trains on text only")


def read_content(value: Any, key: str) -> Content:
    """Read a text, a list of parts, or a number or boolean (as JSON). Raises RowProblem."""
    if isinstance(value, str):
        return Content(value)
    if isinstance(value, float) and math.isnan(value):
        raise RowProblem(f"{key} is NaN, which stands for a missing value in tables")
    if isinstance(value, bool | int | float):
        return Content(json.dumps(value))
    if value is None:
        raise RowProblem(f"{key} is missing")
    if isinstance(value, Mapping) and "text" in value and value.keys() <= {"type", "text"}:
        value = [value]  # one part
    if not isinstance(value, list):
        raise RowProblem(f"{key} is not a text but {type(value).__name__}; write it as JSON text")
    texts: list[str] = []
    reasoning: list[str] = []
    result = Content("")
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


def parse_json_text(text: str, key: str) -> Any:
    """Return the value of a text in JSON, or of a list or object in Python's notation. Raises RowProblem."""
    try:
        return json.loads(text)
    except RecursionError:
        raise RowProblem(f"{key} is a text of JSON that is nested too deeply") from None
    except ValueError as error:
        problem = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    if text.lstrip()[:1] in ("[", "{"):  # as pandas writes lists into CSV files
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            return ast.literal_eval(text.strip())
    raise RowProblem(f"{key} is a text that is not JSON: {problem}")


def parse_objects(value: Any, key: str) -> list[dict[str, Any]]:
    """Return a list of objects given as such, as one object, or as JSON text of either. Raises RowProblem."""
    if isinstance(value, str):
        value = parse_json_text(value, key) if value.strip() else []
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


def as_call(function: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": dict(function)}


def parse_call_text(text: str) -> list[dict[str, Any]] | None:
    """Return the calls that a text spells as JSON: {"name", "arguments"} or a list of these; None for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return None
    return [as_call(call) for call in calls]


def read_flag(key: str, value: Any, what: str) -> bool:
    """Return whether a message or row with this flag is trained on. Raises RowProblem for other values than 0 and 1."""
    if isinstance(value, str):  # as in the cells of a CSV file
        value = _FLAG_TEXTS.get(value.strip().lower(), value)
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise RowProblem(
        f"{key} of {what} is {value!r}; edgetune trains on a {'turn' if what == 'a message' else 'row'} (1, true) "
        "or does not (0, false)"
    )


def is_unicode(text: str) -> bool:
    """Whether a text has no half character (a lone UTF-16 surrogate)."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_characters(value: Any) -> None:
    """Raise RowProblem for half a character (a lone UTF-16 surrogate) in the texts and keys of a value."""
    try:
        (value if isinstance(value, str) else _as_text(value)).encode()
    except RecursionError:
        raise RowProblem("is nested too deeply") from None
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise RowProblem(
            f"holds half a character (U+{code:04X}, a lone UTF-16 surrogate), which is no text; it was probably cut"
        ) from None
