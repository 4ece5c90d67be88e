"""Encoded rows in arrays are the rows that were given."""

from __future__ import annotations

from edgetune.data.encoded_rows import EncodedRows
from edgetune.data.masks import EncodedRow

ROWS = [EncodedRow([5, 2**31 - 1, 7], [False, True, True]), EncodedRow([], []), EncodedRow([5], [False])]


def test_rows_and_counts_are_those_of_the_lists() -> None:
    rows = EncodedRows(ROWS)
    assert list(rows) == ROWS == rows[:]
    assert (rows[0], rows[-1], rows[1:]) == (ROWS[0], ROWS[2], ROWS[1:])
    assert (len(rows), rows.tokens, rows.trained, rows.longest) == (3, 4, 2, 3)
    assert (rows[0].supervised[0], type(rows[0].supervised[0])) == (False, bool)


def test_no_rows_have_no_tokens() -> None:
    rows = EncodedRows()
    assert not rows
    assert (rows.tokens, rows.trained, rows.longest, list(rows)) == (0, 0, 0, [])


def test_equal_rows_are_equal_and_have_equal_digests() -> None:
    rows, others = EncodedRows(ROWS), EncodedRows(reversed(ROWS))
    assert rows == EncodedRows(ROWS)
    assert rows != others
    assert set(rows.digests()) == set(others.digests())
    assert len(set(rows.digests())) == 3
    assert EncodedRows([EncodedRow([1, 2], [False, True])]) != EncodedRows([EncodedRow([1, 2], [False, False])])
