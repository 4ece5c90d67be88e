"""Rows as JSON lines in the format `messages`, which read again are the same rows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, TextIO

from edgetune.data.formats import ChatRow
from edgetune.data.key_names import CALL_ROLES


def as_messages(row: ChatRow) -> dict[str, Any]:
    """Return a row as an object of messages, tools and template options.

    An answer that is not trained on has the weight 0. A content that is a tool call in JSON has the role function_call.
    """
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
        if index in row.untrained:
            written["weight"] = 0
        messages.append(written)
    result: dict[str, Any] = {"messages": messages}
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
