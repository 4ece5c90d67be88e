"""Rows that are kept in a file are the rows that were given."""

from __future__ import annotations

from typing import Any

from edgetune.data.formats import ChatRow
from edgetune.data.row_store import RowStore

TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": None, "tool_calls": [{"id": 3.5, "ok": True}]},
]
PLAIN = ChatRow(
    [{"role": "user", "content": "ä\u2028"}, {"role": "assistant", "content": "a" * 70_000}], place="a, line 1"
)
FULL = ChatRow(
    TALK, [{"name": "f"}], frozenset({1}), "b, line 2", {"x": [1]}, ("id",), {1: [{"name": "f"}]}, {1: "why"}
)


def test_every_part_of_a_row_is_kept() -> None:
    store = RowStore([PLAIN, FULL])
    assert list(store) == [PLAIN, FULL]
    assert store[-1] == FULL
    assert len(store) == 2


def test_rows_can_be_added_after_others_were_read() -> None:
    store = RowStore()
    assert not store
    for number in range(200):
        store.append(PLAIN if number % 2 else FULL)
        assert store[number] == (PLAIN if number % 2 else FULL)
    assert list(store) == [FULL, PLAIN] * 100


def test_slices_and_selections_are_rows_of_the_same_file() -> None:
    store = RowStore(ChatRow([{"role": "assistant", "content": str(number)}]) for number in range(10))
    assert [row.messages[0]["content"] for row in store[2:8:2]] == ["2", "4", "6"]
    assert [row.messages[0]["content"] for row in store.select([9, 0])] == ["9", "0"]
    part = store[-2:]
    del store
    assert [row.messages[0]["content"] for row in part] == ["8", "9"]
