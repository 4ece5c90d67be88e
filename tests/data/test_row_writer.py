"""Rows written as messages and read again are the same rows."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.data.formats import ChatRow, RowReader
from edgetune.data.key_names import CALL_ROLES, CONTENT_KEYS, FLAG_KEYS, MESSAGES_KEYS, ROLE_KEYS, ROLES
from edgetune.data.problems import RowProblem
from edgetune.data.row_writer import as_messages, write_rows

_TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | _TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_TEXTS, inner, max_size=2),
    max_leaves=4,
)
_CALL = '{"name": "f", "arguments": {"a": 1}}'
_PARTS = st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "reasoning"]), "text": _TEXTS}), min_size=1, max_size=3
)
_ROLE_NAMES = [*(name for names in ROLES.values() for name in names), *CALL_ROLES, "Human", "narrator"]
_MESSAGES = st.builds(
    lambda role_key, role, content_key, content, others: {**others, role_key: role, content_key: content},
    st.sampled_from(ROLE_KEYS),
    st.sampled_from(_ROLE_NAMES),
    st.sampled_from(CONTENT_KEYS),
    _TEXTS | _PARTS | st.just(_CALL) | st.none(),
    st.dictionaries(
        st.sampled_from([*FLAG_KEYS, *ROLE_KEYS, *CONTENT_KEYS, "name", "tool_calls", "reasoning_content", "x"]),
        _VALUES | st.sampled_from([0, 1, True, False]) | st.just([{"function": {"name": "f"}}]),
        max_size=3,
    ),
)
_ANSWERS = st.builds(lambda text: {"role": "assistant", "content": text}, _TEXTS)
_ROWS = st.builds(
    lambda key, messages, answer, others: {**others, key: [*messages, answer]},
    st.sampled_from(MESSAGES_KEYS),
    st.lists(_MESSAGES, max_size=4),
    _ANSWERS,
    st.dictionaries(
        st.sampled_from(["system", "tools", "functions", "weight", "train", "documents", "chat_template_kwargs", "x"]),
        _VALUES | st.just([{"a": 1}]) | st.just({"enable_thinking": False}),
        max_size=3,
    ),
)
_PAIRS = st.builds(
    lambda pair, system: {pair[0]: pair[1], pair[2]: pair[3], "system_prompt": system},
    st.tuples(st.sampled_from(["prompt", "Question"]), _TEXTS, st.sampled_from(["answer", "output"]), _TEXTS | _PARTS),
    _TEXTS,
)


def _parts(row: ChatRow) -> tuple[Any, ...]:
    return row.messages, row.tools, row.untrained, dict(row.options), dict(row.calls), dict(row.reasoning)


@given(_ROWS | _PAIRS)
def test_what_was_understood_is_understood_again(row: dict[str, Any]) -> None:
    try:
        read = RowReader().read(row)
    except RowProblem:
        return
    written = as_messages(read)
    again = RowReader().read(json.loads(json.dumps(written)))
    assert _parts(again) == _parts(read)
    assert as_messages(again) == written
    assert not again.unread


def test_rows_are_lines_of_json_in_the_format_messages() -> None:
    turns = [("system", "s"), ("human", "q"), ("function_call", _CALL), ("observation", "5"), ("gpt", "ä\n")]
    row = {"tools": '[{"name": "f"}]', "conversations": [{"from": who, "value": text} for who, text in turns], "id": 3}
    row["conversations"][-1]["weight"] = 0  # type: ignore[index]
    file = io.StringIO()
    assert write_rows([RowReader().read(row)], file) == 1
    assert file.getvalue() == (
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, '
        '{"role": "function_call", "content": "{\\"name\\": \\"f\\", \\"arguments\\": {\\"a\\": 1}}"}, '
        '{"role": "tool", "content": "5"}, {"role": "assistant", "content": "ä\\n", "weight": 0}], '
        '"tools": [{"name": "f"}]}\n'
    )


def test_half_a_character_is_refused_before_it_is_written() -> None:
    with pytest.raises(RowProblem, match="half a character"):
        RowReader().read({"prompt": "q", "completion": "\ud83d"})
