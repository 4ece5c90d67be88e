"""Tool calls in a generated text, in the usual syntaxes, validated against the tools' schemas.

A call that cannot be read, of a tool that was not given, or with arguments that its schema does not permit is no call:
its text stays in the answer.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.serving.conversation import Tool, ToolCall
from edgetune.serving.json_schemas import compile_schema
from edgetune.serving.safe_validation import SafeValidator, unchecked_patterns

RawCall = tuple[str, Any]
"""(name, arguments) as they were written."""


@dataclass(frozen=True)
class Syntax:
    """How a family of models writes calls.

    Attributes:
        begin: Text at which a call begins; a text that begins with "{" is one where this is empty.
        end: Text at which it ends; empty: the end of the answer.
        read: Reads what is between them. Raises ValueError, KeyError or TypeError.
        arguments: Key of the arguments.
        force: Text that makes the model write a call in JSON, after which one object (`is_list`: in a list) comes.
        is_list: Whether calls are in a list.
    """

    begin: str
    end: str
    read: Callable[[str], list[RawCall]]
    arguments: str = "arguments"
    force: str = ""
    is_list: bool = False


def _read_json(text: str) -> list[RawCall]:
    value = json.loads(text)
    return [_named(each) for each in (value if isinstance(value, list) else [value])]


def _named(value: Any) -> RawCall:
    function = value.get("function")
    if isinstance(function, dict):
        value = function
    arguments = value["arguments"] if "arguments" in value else value.get("parameters", {})
    return value["name"], arguments


_FUNCTION = re.compile(r"<function=([^>\s]+)>(.*?)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def _read_hermes(text: str) -> list[RawCall]:
    """JSON of Hermes and Qwen, or the tags of Qwen3-Coder."""
    if "<function=" not in text:
        return _read_json(text)
    found = _FUNCTION.findall(text)
    if not found:
        raise ValueError(text)
    return [(name, {key: _plain_or_json(value) for key, value in _PARAMETER.findall(body)}) for name, body in found]


def _plain_or_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


_MISTRAL_CALL = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\][^\[]*)?(?:\[ARGS\])?\s*(?=\{)")


def _read_mistral(text: str) -> list[RawCall]:
    """A JSON list, or name[ARGS]{...} of newer tokenizers."""
    if text.lstrip()[:1] in ("[", "{"):
        return _read_json(text)
    calls, at = [], 0
    text = text.replace("[TOOL_CALLS]", "")
    while at < len(text.rstrip()):
        name = _MISTRAL_CALL.match(text, at)
        if name is None:
            raise ValueError(text)
        arguments, at = json.JSONDecoder().raw_decode(text, name.end())
        calls.append((name.group(1), arguments))
    return calls


def _read_llama(text: str) -> list[RawCall]:
    """JSON objects, separated by semicolons."""
    calls, at = [], 0
    text = text.strip()
    while at < len(text):
        value, at = json.JSONDecoder().raw_decode(text, at)
        if not isinstance(value, dict) or not ({"parameters", "arguments"} & value.keys()):
            raise ValueError(text)
        calls.append(_named(value))
        rest = text[at:].lstrip(" ;\n")
        at = len(text) - len(rest)
    return calls


HERMES = Syntax("<tool_call>", "</tool_call>", _read_hermes, force="<tool_call>\n")
MISTRAL = Syntax("[TOOL_CALLS]", "", _read_mistral, force="[TOOL_CALLS]", is_list=True)
PYTHON_TAG = Syntax("<|python_tag|>", "", _read_llama, "parameters")
BARE_JSON = Syntax("", "", _read_llama, "parameters")
SYNTAXES = (HERMES, MISTRAL, PYTHON_TAG, BARE_JSON)
"""All are read; the first that the chat template mentions is the one a model is made to write."""
MARKERS = frozenset(text for syntax in SYNTAXES for text in (syntax.begin, syntax.end) if text) | {
    "[ARGS]", "[CALL_ID]",
}  # fmt: skip
"""Texts of special tokens that belong to calls."""


def find_syntax(template: str) -> Syntax:
    """Return the syntax in which a chat template shows calls to the model."""
    if HERMES.begin in template:
        return HERMES
    if MISTRAL.begin in template:
        return MISTRAL
    return BARE_JSON if '"parameters"' in template else HERMES


def call_schema(tools: Sequence[Tool], syntax: Syntax, *, parallel: bool = False) -> dict[str, Any]:
    """Return the JSON schema of a call of one of the tools, as the syntax writes it."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, syntax.arguments: dict(tool.schema)},
            "required": ["name", syntax.arguments],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    call: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if not syntax.is_list:
        return call
    return {"type": "array", "items": call, "minItems": 1} | ({} if parallel else {"maxItems": 1})


class Toolbox:
    """Validates calls of the tools of one request."""

    def __init__(self, tools: Sequence[Tool], field_names: Sequence[str]) -> None:
        """Compile the schemas. Raises ApiError for one that is not valid, with its field."""
        self._validators: dict[str, SafeValidator] = {
            tool.name: compile_schema(tool.schema, field, is_strict=False)
            for tool, field in zip(tools, field_names, strict=True)
        }
        self.unchecked = [
            field for tool, field in zip(tools, field_names, strict=True) if unchecked_patterns(tool.schema)
        ]
        """Fields of the tools with a pattern that is not checked."""

    def check(self, raw: RawCall) -> ToolCall | None:
        """Return the call if it is one of a tool that was given, with arguments that its schema permits."""
        name, arguments = raw
        if not isinstance(name, str) or name not in self._validators:
            return None
        if isinstance(arguments, str):
            arguments = _plain_or_json(arguments or "{}")
        if not isinstance(arguments, dict) or self._validators[name].find_mismatch(arguments) is not None:
            return None
        return ToolCall(f"call_{uuid.uuid4().hex[:24]}", name, json.dumps(arguments, ensure_ascii=False))

    def check_all(self, raw: Sequence[RawCall]) -> list[ToolCall] | None:
        """Return the calls; None unless there are some and all are right."""
        calls = [call for each in raw if (call := self.check(each)) is not None]
        return calls if calls and len(calls) == len(raw) else None


class ToolCallReader:
    """Separates calls from the text of an answer while it is generated."""

    def __init__(self, toolbox: Toolbox, syntax: Syntax | None = None) -> None:
        """Begin a text; with `syntax`, its first call has begun already, without its marker."""
        self._toolbox = toolbox
        self._syntax, self._opening = syntax, ""
        self._pending = ""
        self._is_first = True
        self._has_calls = False

    def feed(self, text: str) -> Iterator[str | ToolCall]:
        """Yield what is certain after another piece of the text."""
        self._pending += text
        while self._pending:
            before = (self._pending, self._syntax)
            yield from self._inside() if self._syntax else self._outside()
            if (self._pending, self._syntax) == before:
                return

    def finish(self) -> Iterator[str | ToolCall]:
        """Yield what is left at the end."""
        if self._syntax is not None:
            yield from self._close(self._pending, "")
        elif self._pending and not (self._has_calls and self._pending.isspace()):
            yield self._pending
        self._pending = ""

    def _outside(self) -> Iterator[str | ToolCall]:
        found = [(at, syntax) for syntax in SYNTAXES if syntax.begin and (at := self._pending.find(syntax.begin)) >= 0]
        if self._is_first and self._pending.lstrip()[:1] == "{":
            found.append((0, BARE_JSON))
        if found:
            at, self._syntax = min(found, key=lambda each: each[0])
            self._opening = self._pending[at : at + len(self._syntax.begin)]
            yield from self._emit(self._pending[:at].rstrip() if self._syntax.begin else "")
            self._pending = self._pending[at + len(self._syntax.begin) :]
            return
        kept = max(overlap(self._pending, syntax.begin) for syntax in SYNTAXES)
        text = self._pending[: len(self._pending) - kept].rstrip()  # space before a call is none of the answer's
        self._pending = self._pending[len(text) :]
        yield from self._emit(text)

    def _inside(self) -> Iterator[str | ToolCall]:
        assert self._syntax is not None
        if not self._syntax.end:
            return
        body, found, rest = self._pending.partition(self._syntax.end)
        if found:
            self._pending = rest
            yield from self._close(body, found)

    def _close(self, body: str, ending: str) -> Iterator[str | ToolCall]:
        assert self._syntax is not None
        syntax, self._syntax = self._syntax, None
        self._is_first = False
        try:
            calls = self._toolbox.check_all(syntax.read(body))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            calls = None
        if calls is None:
            yield from self._emit(self._opening + body + ending)
        else:
            self._has_calls = True
            yield from calls

    def _emit(self, text: str) -> Iterator[str]:
        if text:
            self._is_first = False
            yield text


def overlap(text: str, mark: str) -> int:
    """Return the length of the longest end of the text with which the mark begins, without the whole mark."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
