"""Right answers are right and wrong ones are wrong, in each way of comparing."""

from __future__ import annotations

import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.config import DataConfig
from edgetune.errors import DataError
from edgetune.validation.answers import _MATCHERS, answer_matches

CASES = [
    ("exact", "on", " on\n", True), ("exact", "on", "On", False), ("exact", "", "", True),
    ("json", '{"a": 1, "b": [true, null]}', '{"b":[true,null],"a":1.0}', True), ("json", "[1, 2]", "[2, 1]", False),
    ("json", '{"on": 1}', '{"on": true}', False), ("json", '{"a": "灯"}', '{"a": "\\u706f"}', True),
    ("json", '{"a": 1}', '{"a": 1} and more', False), ("json", '{"a": 1}', "", False), ("json", "0.1", "0.10", True),
    ("json", "[]", "[" * 100_000, False),
    ("number", "#### 1,234", "So that makes $1234.00.", True), ("number", "72", "72 apples, not 71", False),
    ("number", "-3", "the answer is -3", True), ("number", "3", "8-3", True), ("number", "5", "none", False),
    ("number", "0.5", "it is 50e-2.", True), ("number", "2", "1,2", True), ("number", "12", "v1.12", False),
    ("regex", r"^(on|off)$", "off", True), ("regex", r"^(on|off)$", "offline", False),
    ("regex", "三成", "调到三成亮", True),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "expected", "got", "right"), CASES)
def test_answers_match_by_the_kind_of_the_expectation(kind: str, expected: str, got: str, right: bool) -> None:
    assert answer_matches(kind, expected, got) is right


@pytest.mark.parametrize(("kind", "expected"), [("json", "{"), ("number", "none"), ("regex", "(")])
def test_an_expectation_that_cannot_be_used_is_the_users_to_mend(kind: str, expected: str) -> None:
    with pytest.raises(DataError, match="expected answer"):
        answer_matches(kind, expected, "1")


def test_every_kind_of_the_configuration_is_there() -> None:
    assert set(typing.get_args(DataConfig.model_fields["answer"].annotation)) == set(_MATCHERS)


@given(st.sampled_from(sorted(_MATCHERS)), st.text())
def test_no_answer_breaks_the_comparison(kind: str, got: str) -> None:
    answer_matches(kind, "7", got)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_numbers_survive_formatting(number: object) -> None:
    assert answer_matches("number", f"{number}", f"about {number:,} in all.")
