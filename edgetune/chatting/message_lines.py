"""Messages of one or several lines, and messages from the lines of a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from edgetune.errors import DataError

QUOTES = '"""'


def needs_more(text: str) -> bool:
    """Whether a message continues on the next line: behind a backslash, or after an opening of triple quotes."""
    if text.lstrip().startswith(QUOTES):
        return text.count(QUOTES) < 2
    return text.endswith("\\")


def to_message(text: str) -> str:
    """Return the message without its triple quotes, or without the backslashes at the ends of its lines."""
    stripped = text.strip()
    if stripped.startswith(QUOTES) and stripped.count(QUOTES) >= 2 and stripped.endswith(QUOTES):
        return stripped.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
    return text.replace("\\\n", "\n").strip()


class PipeInput:
    """Reads each line of standard input as a message, or several that continue each other."""

    def __init__(self, stream: Any = None) -> None:
        self._stream = stream or sys.stdin.buffer

    def messages(self) -> Iterator[str]:
        """Yield messages and commands. Raises DataError for a line that is not UTF-8."""
        text = ""
        for number, line in enumerate(self._stream, 1):
            try:
                text += line.decode("utf-8").removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError:
                raise DataError(
                    f"line {number} of standard input is not UTF-8 text", "Convert it, for instance with iconv"
                ) from None
            if needs_more(text):
                text += "\n"
                continue
            if message := to_message(text):
                yield message
            text = ""
        if message := to_message(text):
            yield message
