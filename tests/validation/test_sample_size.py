"""When a held-out set is said to be small."""

from __future__ import annotations

import pytest

from edgetune.validation.sample_size import FEW_ROWS, FEW_TOKENS, caution


@pytest.mark.parametrize(
    ("rows", "tokens", "words"),
    [
        (1, 1, "1 held-out row with 1 scored token is a small sample: a difference in 100% of all tokens"),
        (64, 150, "a difference in 2.0% of all tokens can remain unseen"),
        (5, 5000, "5 held-out rows with 5000 scored tokens are a small sample: the standard errors"),
    ],
)
def test_a_small_sample_gets_a_warning_with_its_resolution(rows: int, tokens: int, words: str) -> None:
    assert words in (caution(rows, tokens) or "")


def test_the_warning_begins_just_below_the_limits() -> None:
    assert caution(FEW_ROWS, FEW_TOKENS) is None
    assert caution(FEW_ROWS, FEW_TOKENS - 1)
    assert caution(FEW_ROWS - 1, FEW_TOKENS)
