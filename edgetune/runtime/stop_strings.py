"""Strings that end an answer, which may begin in one token and end in another."""

from __future__ import annotations

from collections.abc import Sequence

from edgetune.errors import RuntimeProblem
from edgetune.runtime.generation_request import TokenEvent


class StopStrings:
    """Finds stop strings in the tokens of one answer, and holds back tokens whose text could begin one.

    The search is over bytes: in UTF-8 no character begins within another one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises RuntimeProblem for an empty string."""
        if not all(stops):
            raise RuntimeProblem("a stop string is empty", "Leave it out, or give some text")
        self._stops = [(text, text.encode("utf-8", "surrogatepass")) for text in stops]
        self._waiting: list[TokenEvent] = []
        self._text = b""
        """Bytes of the waiting tokens."""

    def feed(self, event: TokenEvent) -> tuple[list[TokenEvent], str | None]:
        """Return the tokens that can be shown now, and the stop string that ends with this token, if one does."""
        if not self._stops:
            return [event], None
        self._waiting.append(event)
        self._text += event.bytes_
        if found := self._find():
            at, text = found
            return self._release(at, is_last=True), text
        return self._release(self._safe_bytes()), None

    def finish(self) -> list[TokenEvent]:
        """Return the waiting tokens of an answer that ended without a stop string."""
        waiting, self._waiting, self._text = self._waiting, [], b""
        return waiting

    def _find(self) -> tuple[int, str] | None:
        """Return the earliest place of a stop string, and of those there the longest; None if there is none."""
        places = [(self._text.find(raw), -len(raw), text) for text, raw in self._stops]
        found = min((place for place in places if place[0] >= 0), default=None)
        return found and (found[0], found[2])

    def _safe_bytes(self) -> int:
        """Return how many bytes come before the first place at which a stop string could have begun."""
        longest = max(len(raw) for _, raw in self._stops)
        for start in range(max(0, len(self._text) - longest + 1), len(self._text)):
            rest = self._text[start:]
            if any(raw.startswith(rest) for _, raw in self._stops):
                return start
        return len(self._text)

    def _release(self, count: int, *, is_last: bool = False) -> list[TokenEvent]:
        """Return the tokens within the first `count` bytes; with `is_last` also the part of one that goes beyond."""
        shown: list[TokenEvent] = []
        at = 0
        for event in self._waiting:
            end = at + len(event.bytes_)
            if end > count:
                if is_last and at < count:
                    shown.append(event._replace(bytes_=event.bytes_[: count - at]))
                break
            shown.append(event)
            at = end
        self._waiting = self._waiting[len(shown) :]
        self._text = self._text[at:]
        return shown
