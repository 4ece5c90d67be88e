"""What follows the last assistant turn of a row: nothing is learned from it, so it is left out and counted.

Templates may render the turns before it differently if it is there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from edgetune.data.formats import ChatRow

_NAMES = {"user": "the user", "tool": "a tool result", "system": "a system message"}


@dataclass
class TrailingTurns:
    """Rows that do not end with the assistant: role of the last message -> [number of rows, place of the first]."""

    rows: dict[str, tuple[int, str]] = field(default_factory=dict)

    def leave_out(self, row: ChatRow) -> ChatRow:
        """Return the row up to its last assistant turn, and count it if something follows."""
        length = max((i + 1 for i, m in enumerate(row.messages) if m["role"] == "assistant"), default=0)
        if length in (0, len(row.messages)):
            return row
        self._add(row.messages[-1]["role"], 1, row.place)
        return replace(
            row,
            messages=row.messages[:length],
            calls={i: calls for i, calls in row.calls.items() if i < length},
            reasoning={i: text for i, text in row.reasoning.items() if i < length},
        )

    def _add(self, role: str, rows: int, place: str) -> None:
        count, first = self.rows.get(role, (0, place))
        self.rows[role] = (count + rows, first)

    def merge(self, others: Iterable[TrailingTurns]) -> TrailingTurns:
        """Return the counts of this and others."""
        result = TrailingTurns(dict(self.rows))
        for other in others:
            for role, (count, place) in other.rows.items():
                result._add(role, count, place)
        return result

    def describe(self) -> list[str]:
        """Return one line for each role, with an example."""
        return [
            f"{count} row{'s end' if count > 1 else ' ends'} with {_NAMES.get(role, role)}: "
            f"{'these turns are' if count > 1 else 'that turn is'} left out"
            + (f"; for example {place}" if place and count > 1 else f" ({place})" if place else "")
            for role, (count, place) in self.rows.items()
        ]
