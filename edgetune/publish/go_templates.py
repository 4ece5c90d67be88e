"""The part of Go's text/template that a chat template for Ollama needs, to verify what such a template renders.

Supported: text, `.Field` and `$.Field`, "literals", `if`, `else if`, `else`, `end`, `range .Messages`, and the
conditions `.Field`, `not .Field`, `eq .Field "literal"`. Anything else is an error, also trim
marks (`{{-`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_ACTION = re.compile(r"\{\{\s*(.*?)\s*\}\}", re.DOTALL)
_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|\S+')


def render(source: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """Render a conversation as Ollama does: with all system texts in `.System`, and messages of equal roles merged."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    merged: list[dict[str, str]] = []
    for message in messages:
        if merged and merged[-1]["Role"] == message["role"]:
            merged[-1]["Content"] += "\n\n" + message["content"]
        else:
            merged.append({"Role": message["role"], "Content": message["content"]})
    root = {"System": system, "Messages": merged}
    body, _ = _parse(_tokens(source))
    return "".join(_run(body, root, root))


def escape(text: str) -> str:
    """Escape text for a template."""
    return text.replace("{{", '{{ "{{" }}')


@dataclass
class _Node:
    """Text, an expression, or a block: `range`, or the branches of an `if` as (condition, body)."""

    kind: str
    words: list[str] = field(default_factory=list)
    branches: list[tuple[list[str], list[_Node]]] = field(default_factory=list)


def _tokens(source: str) -> Iterator[tuple[str, str]]:
    at = 0
    for match in _ACTION.finditer(source):
        if match.start() > at:
            yield "text", source[at : match.start()]
        yield "action", match[1]
        at = match.end()
    if at < len(source):
        yield "text", source[at:]


def _parse(tokens: Iterator[tuple[str, str]]) -> tuple[list[_Node], list[str]]:
    """Parse nodes up to the `else` or `end` of the enclosing block; return them and the words of that action."""
    nodes: list[_Node] = []
    for kind, text in tokens:
        words = _WORD.findall(text) if kind == "action" else [text]
        if kind == "text":
            nodes.append(_Node("text", words))
        elif words[0] in ("else", "end"):
            return nodes, words
        elif words[0] in ("if", "range"):
            nodes.append(_block(words, tokens))
        else:
            nodes.append(_Node("value", words))
    return nodes, []


def _block(words: list[str], tokens: Iterator[tuple[str, str]]) -> _Node:
    node = _Node(words[0])
    condition = words[1:]
    while True:
        body, ending = _parse(tokens)
        node.branches.append((condition, body))
        if ending == ["end"]:
            return node
        if not ending or ending[0] != "else" or node.kind == "range":
            raise ValueError(f"{words} has no end")
        condition = ending[2:] if ending[1:2] == ["if"] else ['"always"']


def _run(nodes: Sequence[_Node], dot: Mapping[str, Any], root: Mapping[str, Any]) -> Iterator[str]:
    for node in nodes:
        if node.kind == "text":
            yield node.words[0]
        elif node.kind == "value":
            yield str(_value(node.words, dot, root))
        elif node.kind == "range":
            (words, body), *_ = node.branches
            for item in _value(words, dot, root):
                yield from _run(body, item, root)
        else:
            chosen = next((body for words, body in node.branches if _value(words, dot, root)), [])
            yield from _run(chosen, dot, root)


def _value(words: Sequence[str], dot: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    if words[0] == "not" and len(words) == 2:
        return not _operand(words[1], dot, root)
    if words[0] == "eq" and len(words) == 3:
        return _operand(words[1], dot, root) == _operand(words[2], dot, root)
    if len(words) != 1:
        raise ValueError(f"{' '.join(words)!r} is a part of Go's templates that is not supported")
    return _operand(words[0], dot, root)


def _operand(word: str, dot: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    if word.startswith('"'):
        return json.loads(word)
    scope = root if word.startswith("$.") else dot
    if not word.startswith((".", "$.")):
        raise ValueError(f"{word!r} is a part of Go's templates that is not supported")
    return scope[word.rpartition(".")[2]]
