from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from edgetune.runs.json_format import dumps

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_it_reads_back_as_it_was(value: object) -> None:
    assert json.loads(dumps(value)) == value


def test_only_lists_of_plain_values_stand_on_one_line() -> None:
    text = dumps({"counts": [1, 2, [3]], "rungs": [{"name": "base"}], "none": {}})
    assert (
        text == '{\n  "counts": [1, 2, [3]],\n  "rungs": [\n    {\n      "name": "base"\n    }\n  ],\n  "none": {}\n}'
    )
