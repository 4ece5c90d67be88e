"""Keys of messages reach the template, and keys that nobody reads are counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cases.rendering import REASONING_TEMPLATE, encode, pictures, transformers_picture

THOUGHT = "Two and three make five."


def _row(**keys: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", **keys, "content": "5"}]}


@pytest.mark.parametrize(
    ("keys", "answer", "tokens"),
    [
        ({"reasoning_content": THOUGHT}, f"<think>\n{THOUGHT}\n</think>\n\n5", 58),
        ({"thinking": THOUGHT}, f"<think>\n{THOUGHT}\n</think>\n\n5", 58),
        ({}, "5", 23),
        ({"reasoning": THOUGHT}, f"<think>\n{THOUGHT}\n</think>\n\n5", 58),
        ({"reasoning": THOUGHT, "thinking": THOUGHT}, f"<think>\n{THOUGHT}\n</think>\n\n5", 58),
        ({"reasoning_content": None}, "5", 23),
    ],
)
def test_reasoning_is_trained_on_as_transformers_renders_it(
    tmp_path: Path, keys: dict[str, Any], answer: str, tokens: int
) -> None:
    expected = f"<|im_start|>user\n2 + 3?<|im_end|>\n<|im_start|>assistant\n⟦{answer}<|im_end|>⟧\n"
    assert pictures(tmp_path, [_row(**keys)], REASONING_TEMPLATE) == [expected]
    assert transformers_picture(_row(**keys), REASONING_TEMPLATE) == expected
    encoding = encode(tmp_path, [_row(**keys)], REASONING_TEMPLATE)
    assert encoding.tokens == tokens
    assert not encoding.usage.unused


def test_keys_that_nobody_reads_are_counted_with_an_example(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "5", "mood": "good"}]
    rows = [
        _row(thinking="Two.", reasoning="Three."), _row(foo="bar") | {"extra": 1}, {"conversations": turns},
        _row(foo="bar"),
        {"question": "2+3?", "answer": "5", "reasoning": "Two.", "thinking": "x", "note": None, "tags": []},
    ]  # fmt: skip
    assert encode(tmp_path, rows, REASONING_TEMPLATE).usage.describe() == [
        "foo of a message, which the chat template does not render: 2 rows, for example rows.jsonl, line 2",
        "reasoning of a message, which the chat template does not render: 1 row, for example rows.jsonl, line 1",
        "extra: 1 row, for example rows.jsonl, line 2",
        "mood of a message, which the chat template does not render: 1 row, for example rows.jsonl, line 3",
        "reasoning: 1 row, for example rows.jsonl, line 5",
        "thinking: 1 row, for example rows.jsonl, line 5",
    ]


def test_reasoning_that_a_template_shows_in_the_last_turn_only_counts_as_rendered(tmp_path: Path) -> None:
    template = REASONING_TEMPLATE.replace("and thought", "and thought and loop.last")
    first = _row(thinking=THOUGHT)["messages"]
    encoding = encode(tmp_path, [{"messages": [*first, *_row()["messages"]]}], template)
    assert not encoding.usage.unused
    assert encoding.split == 1
