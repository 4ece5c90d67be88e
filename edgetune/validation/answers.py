"""Check generated answers, in the ways that `data.answer` offers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from edgetune.errors import DataError

CHOICE = "choice"
"""The kind whose answers are chosen by log-likelihood (edgetune/validation/choices.py)."""
_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][+-]?\d{1,3})?")


def answer_matches(kind: str, expected: str, got: str) -> bool:
    """Whether a generated answer equals the expected one. Whitespace around either is ignored.

    `kind` is "exact" (equal strings), "json" (equal values, in any key order), "number" (equal last numbers), "regex"
    (`expected` is a pattern that occurs in `got`) or "choice" (the same choice).

    Raises:
        DataError: `expected` is not of this kind.
    """
    return _MATCHERS[kind](expected.strip(), got.strip())


def _json_matches(expected: str, got: str) -> bool:
    try:
        wanted = _parse_json(expected)
    except ValueError:
        raise DataError(f"the expected answer {expected[:60]!r} is not JSON", "Set data.answer: exact.") from None
    try:
        return bool(_typed(_parse_json(got)) == _typed(wanted))
    except (ValueError, RecursionError):
        return False


def _parse_json(text: str) -> Any:
    return json.loads(text, parse_float=Decimal, parse_int=Decimal)


def _typed(value: Any) -> Any:
    """Convert a value so that `true` differs from 1, which are equal in Python; 30 and 30.0 stay equal."""
    if isinstance(value, dict):
        return {key: _typed(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_typed(entry) for entry in value]
    return (isinstance(value, bool), value)


def _number_matches(expected: str, got: str) -> bool:
    wanted = _last_number(expected)
    if wanted is None:
        raise DataError(f"the expected answer {expected[:60]!r} holds no number", "Set data.answer: exact.")
    return _last_number(got) == wanted


def _last_number(text: str) -> Decimal | None:
    """`So she pays $1,234.50.` -> 1234.50"""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def _regex_matches(expected: str, got: str) -> bool:
    try:
        return re.search(expected, got) is not None
    except re.error as error:
        raise DataError(f"the expected answer {expected[:60]!r} is not a regular expression: {error}") from None


_MATCHERS: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda expected, got: expected == got,
    "json": _json_matches,
    "number": _number_matches,
    "regex": _regex_matches,
    CHOICE: lambda expected, got: expected == got,
}
