"""Problems of rows: collected over all files, grouped by kind, and raised together or skipped."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from edgetune.errors import DataError

SHOWN_PROBLEMS = 20
"""Kinds of problems that a message shows."""
SHOWN_PLACES = 10
"""Further rows of one kind that a message names."""
LISTED_ROWS = 1000
"""Skipped rows that the manifest of a run lists."""

_HINT = "Correct or remove these rows, or leave them out with data.on_bad_row: skip; docs/data.md lists the formats"
_DETAIL = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\d+")


class RowProblem(ValueError):
    """A problem of one row; the caller adds the place of the row."""

    def __init__(self, problem: str, hint: str | None = None) -> None:
        super().__init__(problem)
        self.hint = hint


@dataclass
class _Kind:
    """Problems whose texts differ in quoted parts and numbers only."""

    first: str
    hint: str | None
    others: list[str] = field(default_factory=list)
    count: int = 1

    def describe(self) -> str:
        if self.count == 1:
            return self.first
        more = self.count - 1
        rest = "; ..." if more > len(self.others) else ""
        return f"{self.first} (and {more} more row{'s' if more > 1 else ''}: {'; '.join(self.others)}{rest})"


@dataclass
class RowProblems:
    """Problems of the rows of one or more files."""

    skip: bool = False
    """Leave the rows out instead of stopping."""
    failures: list[DataError] = field(default_factory=list)
    """Problems of whole files, which are never skipped."""
    count: int = 0
    rows: list[str] = field(default_factory=list)
    """The first LISTED_ROWS problems, each with the place of its row."""
    _kinds: dict[str, _Kind] = field(default_factory=dict)
    _more_kinds: int = 0
    """Rows whose kind of problem is kept no more."""

    def add(self, place: str, problem: str, hint: str | None = None) -> None:
        """Add the problem of the row at `place`."""
        self.count += 1
        text = f"{place}: {problem}" if place else problem
        text = text.encode("utf-8", "backslashreplace").decode()  # half a character cannot be printed
        if len(self.rows) < LISTED_ROWS:
            self.rows.append(text)
        name = _DETAIL.sub("", problem)
        if name not in self._kinds and len(self._kinds) >= LISTED_ROWS:  # each row in a way of its own
            self._more_kinds += 1
            return
        kind = self._kinds.get(name)
        if kind is None:
            self._kinds[name] = _Kind(text, hint)
            return
        kind.count += 1
        if len(kind.others) < SHOWN_PLACES:
            kind.others.append(place)

    def describe(self) -> list[str]:
        """Return one line for each kind: the first row in full, and the places of others."""
        return [kind.describe() for kind in self._kinds.values()]

    def raise_if_any(self) -> None:
        """Raise one DataError for all of them, unless they are skipped."""
        if self.failures or (self.count and not self.skip):
            self.raise_all()

    def raise_all(self) -> None:
        """Raise one DataError for all of them. Call it only if there are some."""
        if len(self.failures) == 1 and not self.count:
            raise self.failures[0]
        hints = {failure.hint for failure in self.failures} | {kind.hint for kind in self._kinds.values()}
        lines = [failure.message for failure in self.failures] + self.describe()
        hint = hints.pop() if len(hints) == 1 else None
        if hint and self.count and not self.skip and "on_bad_row" not in hint:
            hint = f"{hint}, or leave such rows out with data.on_bad_row: skip"
        raise DataError.of_many(
            "problems in the data", lines[:SHOWN_PROBLEMS], hint or _HINT, total=len(lines) + self._more_kinds
        )
