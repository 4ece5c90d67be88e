"""Rows as JSON lines in the format `messages`, which read again are the same rows."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from typing import Any, TextIO

from edgetune.data.chat_rows import ChatRow, Columns, Label, Pair, PlainText
from edgetune.data.key_names import CALL_ROLES


def as_messages(row: ChatRow) -> dict[str, Any]:
    """Return a row as an object of messages, tools and template options, and of what its objective reads beside them.

    An answer that is not trained on has the weight 0. A content that is a tool call in JSON has the role function_call.
    Of a pair, `messages` is the prompt, and `chosen` and `rejected` are the answers; a document is a `text`.
    """
    match row.beside:
        case Pair(rejected, prompt, margin):
            chosen, worse = _messages(row, range(prompt)), _messages(rejected, range(prompt))
            answers = {"messages": chosen[:prompt], "chosen": chosen[prompt:], "rejected": worse[prompt:]}
            return answers | ({} if margin is None else {"margin": margin}) | _beside(row)
        case Label(desirable):
            last = max(index for index, message in enumerate(row.messages) if message["role"] == "assistant")
            return {"messages": _messages(row, range(last)), "label": desirable} | _beside(row)
        case Columns(values):
            return {"messages": _messages(row, range(len(row.messages)))} | _beside(row) | values
        case PlainText(text):
            return {"text": text}
    return {"messages": _messages(row)} | _beside(row)


def _messages(row: ChatRow, context: Collection[int] = ()) -> list[dict[str, Any]]:
    """Return the messages of a row; those of `context` are not trained on anyway, so they state no weight."""
    messages = []
    for index, message in enumerate(row.messages):
        written = dict(message)
        if index in row.calls:
            written["role"] = CALL_ROLES[0]
        if index in row.reasoning:
            written["content"] = [
                {"type": "reasoning", "text": row.reasoning[index]},
                {"type": "text", "text": message.get("content") or ""},
            ]
        if index in row.untrained and index not in context:
            written["weight"] = 0
        messages.append(written)
    return messages


def _beside(row: ChatRow) -> dict[str, Any]:
    """Return the tools and the template options of a row."""
    result: dict[str, Any] = {}
    if row.tools:
        result["tools"] = row.tools
    options = dict(row.options)
    if "documents" in options:
        result["documents"] = options.pop("documents")
    return result | ({"chat_template_kwargs": options} if options else {})


def write_rows(rows: Iterable[ChatRow], file: TextIO) -> int:
    """Write one row on a line, and return their number."""
    count = 0
    for row in rows:
        file.write(json.dumps(as_messages(row), ensure_ascii=False) + "\n")
        count += 1
    return count
