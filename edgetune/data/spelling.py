"""Spell tools, tool calls and empty contents of a row in the way that its template reads.

Rows have them in several equal spellings: arguments as JSON text (as in OpenAI's API) or as an object, a content of
null or none at all beside tool calls, a tool with or without its wrapper. A template reads some of these spellings. It
refuses others or renders them wrongly: JSON text within JSON text, the word None, or a tool without its name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from edgetune.data.chat import ChatTemplate
from edgetune.data.formats import ChatRow
from edgetune.errors import DataError

Message = dict[str, Any]


def spell_as_read(template: ChatTemplate, row: ChatRow) -> ChatRow:
    """Return the row in the first spelling that the template renders, or as it is if there is none."""
    if not row.tools and not any(_is_ambiguous(message) for message in row.messages):
        return row
    return next((each for each in _spellings(row) if _reads(template, each)), row)


def _is_ambiguous(message: Message) -> bool:
    return bool(message.get("tool_calls")) or message.get("content") is None


def _spellings(row: ChatRow) -> Iterator[ChatRow]:
    """Yield the row as it is, and then with one to three changes."""
    yield row
    filled = replace(row, messages=[_with_content(message) for message in row.messages])
    wrapped = replace(filled, tools=None if row.tools is None else [_wrapped(tool) for tool in row.tools])
    for arguments in (None, _as_object, _as_text):
        for each in (row, filled, wrapped):
            yield (
                each
                if arguments is None
                else replace(each, messages=[_with_arguments(m, arguments) for m in each.messages])
            )


def _reads(template: ChatTemplate, row: ChatRow) -> bool:
    """Whether the template renders a row, without the word None and without JSON text within JSON text."""
    try:
        text = template.render(row.messages, tools=row.tools)
    except DataError:
        return False
    stated = [call for message in row.messages for call in _arguments_of(message) if isinstance(call, str)]
    if any(
        escaped != given and escaped in text
        for given in stated
        for escaped in [json.dumps(given, ensure_ascii=False)[1:-1]]
    ):
        return False
    plain = [tool["name"] for tool in row.tools or [] if _wrapped(tool) is not tool]
    if any(isinstance(name, str) and name not in text for name in plain):
        return False
    if all(message.get("content", "") is not None for message in row.messages):
        return True
    try:
        filled = template.render([_with_content(message) for message in row.messages], tools=row.tools)
    except DataError:
        return True
    return text.count("None") <= filled.count("None")


def _with_content(message: Message) -> Message:
    return {**message, "content": ""} if message.get("content") is None else message


def _wrapped(tool: dict[str, Any]) -> dict[str, Any]:
    return tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool}


def _arguments_of(message: Message) -> list[Any]:
    calls = [call.get("function", call) for call in message.get("tool_calls") or [] if isinstance(call, dict)]
    return [call["arguments"] for call in calls if isinstance(call, dict) and "arguments" in call]


def _with_arguments(message: Message, change: Callable[[Any], Any]) -> Message:
    def changed(call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        if isinstance(call.get("function"), dict):
            return {**call, "function": changed(call["function"])}
        return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call

    calls = message.get("tool_calls")
    return {**message, "tool_calls": [changed(call) for call in calls]} if isinstance(calls, list) else message


def _as_object(arguments: Any) -> Any:
    try:
        found = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments
    return found if isinstance(found, dict) else arguments


def _as_text(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments
