"""Whatever key is added to a row or message, its value is read, or the key is named, or the row is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.data import key_names
from edgetune.data.formats import RowReader
from edgetune.data.problems import RowProblem

NAMES = sorted(
    {
        name
        for table in vars(key_names).values()
        if isinstance(table, tuple)
        for name in table
        if name and isinstance(name, str)
    }
)
KEYS = [*NAMES, "name", "tool_calls", "function_call", "documents", "Role", "Content", "Question", "unheard_of"]
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
ROWS: list[dict[str, Any]] = [
    {"messages": [USER, ANSWER]}, {"messages": [USER, CALL, ANSWER], "tools": [{"function": {"name": "f"}}]},
    {"conversations": [{"from": "human", "value": [{"type": "text", "text": "q"}]}, {"from": "gpt", "value": "a"}]},
    {"conversation": [{"human": "q", "assistant": "a"}]}, {"conversation": [{"user": "q"}, {"assistant": "a"}]},
    {"instruction": "q", "input": "i", "output": "a", "history": [["q", "a"]]}, {"question": "q", "answer": "a"},
    {"prompt": [USER], "completion": [ANSWER]}, {"items": [{"id": 1}], "question": "q", "answer": "a"},
]  # fmt: skip
MARK = "a mark"
VALUES = [MARK, [MARK], {"x": MARK}, [USER | {"content": MARK}], [{"type": "text", "text": MARK}]]


def _objects(value: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[dict[str, Any], tuple[Any, ...]]]:
    """Yield each object in a row, with the keys that lead to it."""
    if isinstance(value, dict):
        yield value, keys
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _objects(each, (*keys, key))


@given(st.sampled_from(ROWS), st.integers(0, 20), st.sampled_from(KEYS), st.sampled_from(VALUES))
def test_no_key_vanishes(row: dict[str, Any], place: int, key: str, value: Any) -> None:
    row = copy.deepcopy(row)
    objects = list(_objects(row))
    holder, path = objects[place % len(objects)]
    if key in holder:
        return
    holder[key] = value
    reader = RowReader()
    for _ in range(2):  # keys that are met for the first time, and keys that are known
        try:
            read = reader.read(row)
        except RowProblem:
            continue
        named = [label.partition(" ")[0].rpartition(".")[2] for label in read.unread]
        assert MARK in repr(read) or {key, *map(str, path[:1])} & set(named), (row, read)


@pytest.mark.parametrize("row", ROWS)
def test_the_rows_themselves_are_read(row: dict[str, Any]) -> None:
    assert RowReader().read(row).answers
