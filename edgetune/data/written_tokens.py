"""Texts of special tokens that users write within messages: the tokenizer makes these tokens of them.

transformers does the same, so the ids stay as they are; the rows are counted and named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgetune.data.formats import ChatRow
from edgetune.data.text_tokenizer import TextTokenizer

SHOWN_TOKENS = 10


@dataclass
class WrittenTokens:
    """Special tokens that are written in messages and tools: text of the token -> [rows, place of the first]."""

    anywhere: dict[str, tuple[int, str]] = field(default_factory=dict)
    stops: dict[str, tuple[int, str]] = field(default_factory=dict)
    """The stop tokens of them that are in answers that are trained on."""

    def count(self, tokenizer: TextTokenizer, row: ChatRow) -> None:
        """Count the special tokens that the row holds as text."""
        pattern = tokenizer.special_pattern
        if pattern is None:
            return
        found = _find(pattern, [row.messages, row.tools, row.options.get("documents")])
        if not found:
            return
        _add(self.anywhere, dict.fromkeys(found, (1, row.place)))
        stops = set(tokenizer.stop_texts)
        _add(
            self.stops,
            {
                text: (1, row.place)
                for text in _find(pattern, [row.messages[index] for index in row.answers])
                if text in stops
            },
        )

    def count_text(self, tokenizer: TextTokenizer, text: str, place: str) -> None:
        """Count the special tokens that a document holds as text."""
        pattern = tokenizer.special_pattern
        if pattern is not None:
            _add(self.anywhere, dict.fromkeys(pattern.findall(text), (1, place)))

    def merge(self, others: Iterable[WrittenTokens]) -> WrittenTokens:
        """Return the counts of this and others."""
        result = WrittenTokens(dict(self.anywhere), dict(self.stops))
        for other in others:
            _add(result.anywhere, other.anywhere)
            _add(result.stops, other.stops)
        return result

    def describe(self) -> list[str]:
        """Return a line about all tokens, and one about stop tokens within answers; [] if there are none."""
        lines = []
        if self.anywhere:
            lines.append(
                "messages hold the text of special tokens, which becomes these tokens, as in transformers: "
                + _list_tokens(self.anywhere)
            )
        if self.stops:
            lines.append(
                "answers hold the text of a stop token, at which the model learns to stop; the chat template ends "
                "answers itself, so remove it from the rows: " + _list_tokens(self.stops)
            )
        return lines


def _find(pattern: re.Pattern[str], value: Any) -> dict[str, None]:
    strings: list[str] = []
    _collect_strings(value, strings)
    if not pattern.search("\0".join(strings)):  # most rows have none, and one search is faster than many
        return {}
    return dict.fromkeys(text for string in strings for text in pattern.findall(string))


def _collect_strings(value: Any, found: list[str]) -> None:
    """Add the strings within a value, keys and roles too."""
    if isinstance(value, str):
        found.append(value)
    elif isinstance(value, Mapping):
        found.extend(map(str, value))
        for each in value.values():
            _collect_strings(each, found)
    elif isinstance(value, list | tuple):
        for each in value:
            _collect_strings(each, found)


def _add(counts: dict[str, tuple[int, str]], more: Mapping[str, tuple[int, str]]) -> None:
    for text, (rows, place) in more.items():
        count, first = counts.get(text, (0, place))
        counts[text] = (count + rows, first)


def _list_tokens(counts: Mapping[str, tuple[int, str]]) -> str:
    parts = [
        f"{text} ({rows} row{'s' if rows > 1 else ''}{f', for example {place}' if place else ''})"
        for text, (rows, place) in sorted(counts.items(), key=lambda item: -item[1][0])
    ]
    rest = len(parts) - SHOWN_TOKENS
    return "; ".join(parts[:SHOWN_TOKENS]) + (f"; and {rest} more tokens" if rest > 0 else "")
