"""Rows of each format become conversations; rows of none are named with their keys."""

from __future__ import annotations

from typing import Any

import pytest

from edgetune.data.formats import convert_rows, detect_format, to_chat_row
from edgetune.data.problems import SHOWN_PLACES, RowProblem
from edgetune.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
EXCHANGE = [USER, ASSISTANT]
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("form", "row", "expected"),
    [
        ("messages", {"messages": EXCHANGE, "id": 3}, EXCHANGE),
        (
            "messages",
            {"messages": [{"role": "developer", "content": [{"type": "text", "text": "s"}]}, *EXCHANGE]},
            [SYSTEM, *EXCHANGE],
        ),
        (
            "sharegpt",
            {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            [SYSTEM, *EXCHANGE],
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "function_call", "value": "{}"}, {"from": "observation", "value": "5"}]},
            [{"role": "assistant", "content": "{}"}, {"role": "tool", "content": "5"}],
        ),
        ("alpaca", {"instruction": "q", "input": "", "output": "a"}, EXCHANGE),
        ("alpaca", {"instruction": "q", "input": None, "output": "a", "system": None}, EXCHANGE),
        (
            "alpaca",
            {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["q", "a"]]},
            [SYSTEM, *EXCHANGE, {"role": "user", "content": "q\ni"}, ASSISTANT],
        ),
        ("prompt-completion", {"prompt": "q", "completion": "a"}, EXCHANGE),
        ("prompt-completion", {"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, [SYSTEM, *EXCHANGE]),
        ("prompt-completion", {"question": "q", "answer": "a"}, EXCHANGE),
        ("prompt-completion", {"prompt": "q", "completion": 5}, [USER, {"role": "assistant", "content": "5"}]),
    ],
)
def test_rows_of_each_format_become_conversations(
    form: str, row: dict[str, Any], expected: list[dict[str, str]]
) -> None:
    assert detect_format(row) == form
    assert to_chat_row(row).messages == to_chat_row(row, form).messages == expected


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ([], "not an object but list"),
        ({}, "its keys are none"),
        ({"body": "x"}, r"in no known format; its keys are body; looked for messages .*; or sharegpt .*; or alpaca"),
        ({"text": "x"}, "has text: these are rows for the objective pretrain; the objective here is sft"),
        (
            {"question": "x", "id": 3},
            r"its keys are question, id \(question has no answer beside it; prompts alone are .*\); looked",
        ),
        ({"answer": "x"}, r"\(answer has no question beside it\)"),
        ({"role": "user", "content": "x"}, r"is a single message \(role, content\), not a conversation"),
        ({"messages": "hello"}, "messages is not a list"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["x"]}, "message 1 of messages is a text without a role"),
        ({"messages": [5]}, "message 1 of messages is not an object"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "role is 'narrator'; known are system"),
        ({"messages": [{"role": "user"}]}, "content is missing"),
        ({"messages": [{"role": "user", "content": {}}]}, "content is not a text but dict"),
        ({"messages": [USER]}, "no assistant message"),
        ({"instruction": "q", "output": "a", "history": ["x"]}, "history is not a list of"),
    ],
)
def test_what_is_wrong_with_a_row(row: Any, problem: str) -> None:
    with pytest.raises(RowProblem, match=problem):
        to_chat_row(row)


def test_a_named_format_is_the_only_one_tried() -> None:
    with pytest.raises(RowProblem, match=r"looked for alpaca instruction \+ output \[\+ input, system, history\]$"):
        to_chat_row({"prompt": "q", "completion": "a"}, "alpaca")


def test_problems_of_a_kind_are_one_line_with_the_places_of_the_rows() -> None:
    rows = [(f"f, row {number}", {"body": "x"}) for number in range(1, 31)]
    with pytest.raises(DataError) as caught:
        convert_rows([*rows, ("f, row 31", [])])
    first, unknown, other = caught.value.message.splitlines()
    assert first == "2 problems in the data:"
    assert unknown.startswith("  - f, row 1: in no known format; its keys are body; looked for messages")
    places = "; ".join(f"f, row {number}" for number in range(2, 2 + SHOWN_PLACES))
    assert unknown.endswith(f"(and 29 more rows: {places}; ...)")
    assert other == "  - f, row 31: not an object but list"
