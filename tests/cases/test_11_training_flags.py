"""Flags of messages and rows decide what is trained on, or are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgetune.errors import DataError
from tests.cases.rendering import encode, pictures

PICTURE = (
    "<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>{}\n"
    "<|im_start|>user\nPolitely.<|im_end|>\n<|im_start|>assistant\n⟦Yes.<|im_end|>⟧\n"
)


def _row(user: dict[str, Any] | None = None, good: dict[str, Any] | None = None, **bad: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": "Say yes.", **(user or {})},
            {"role": "assistant", "content": "No!", **bad},
            {"role": "user", "content": "Politely."},
            {"role": "assistant", "content": "Yes.", **(good or {})},
        ]
    }


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize(("off", "on"), [(0, 1), (False, True), (0.0, None)])
def test_a_turn_with_a_flag_of_zero_is_context_only(tmp_path: Path, key: str, off: Any, on: Any) -> None:
    row = _row(good={key: on}, **{key: off})
    assert pictures(tmp_path, [row]) == [PICTURE.format("No!", "")]
    encoding = encode(tmp_path, [row])
    assert (encoding.tokens, encoding.supervised, encoding.untrained_turns) == (55, 5, 1)
    assert not encoding.usage.unused


def test_without_flags_and_with_flags_of_a_user_all_answers_are_trained_on(tmp_path: Path) -> None:
    assert pictures(tmp_path, [_row()]) == [PICTURE.format("⟦No!", "⟧")]
    row = _row(user={"train": True})
    assert pictures(tmp_path, [row]) == [PICTURE.format("⟦No!", "⟧")]
    assert encode(tmp_path, [row]).usage.describe() == ["train of a message: 1 row, for example rows.jsonl, line 1"]


def test_flags_of_sharegpt_turns_are_honored(tmp_path: Path) -> None:
    who = {"user": "human", "assistant": "gpt"}
    turns = [
        {"from": who[m.pop("role")], "value": m.pop("content"), **m} for m in map(dict, _row(weight=0)["messages"])
    ]
    assert pictures(tmp_path, [{"conversations": turns}]) == [PICTURE.format("No!", "")]


def test_a_row_with_nothing_left_is_dropped_and_counted(tmp_path: Path) -> None:
    no_answer = {"messages": _row(weight=0)["messages"][:2]}
    encoding = encode(tmp_path, [_row(), no_answer, {**_row(), "weight": 0}])
    assert (len(encoding.rows), encoding.dropped, encoding.untrained_turns) == (1, 2, 3)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (_row(weight=0.5), "message 2: weight of a message is 0.5; edgetune trains on a turn"),
        (_row(train="no"), "message 2: train of a message is 'no'"),
        (_row() | {"weight": 2}, "weight of the row is 2"),
        (_row(train_detail=[{"begin_offset": 0}]), "message 2: train_detail marks parts of a message"),
        (
            {"prompt": "q", "completion": "a", "label": True},
            "has the label true: these are rows for the objective kto; the objective here is sft",
        ),
        (
            {"prompt": "q", "completion": "a", "label": False},
            "has the label false: these are rows for the objective kto",
        ),
        (_row() | {"kto_tag": False}, "has the kto_tag false: these are rows for the objective kto"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            "has chosen and rejected: these are rows for the objectives dpo, ",
        ),
        (
            {"chosen": _row()["messages"], "rejected": _row()["messages"]},
            "has chosen and rejected: these are rows for the objectives dpo, ",
        ),
    ],
)
def test_flags_that_cannot_be_honored_are_refused(tmp_path: Path, row: Any, problem: str) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl, line 1: {problem}"):
        encode(tmp_path, [row])


def test_a_label_that_is_a_class_is_a_key_like_others(tmp_path: Path) -> None:
    encoding = encode(tmp_path, [{"prompt": "q", "completion": "a", "label": "spam"}])
    assert encoding.usage.describe() == ["label: 1 row, for example rows.jsonl, line 1"]
