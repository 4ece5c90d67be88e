"""Rows of pairs, labels, prompts and text in the shapes of the field, and the tokens that objectives get of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.config import DataConfig
from edgetune.data.chat import ChatTemplate
from edgetune.data.chat_rows import ChatRow, Columns, Label, Pair, PlainText
from edgetune.data.dataset import hold_out, read_splits
from edgetune.data.encoded_split import EncodedSplit
from edgetune.data.objective_readers import READERS, reader_for
from edgetune.data.preview import format_totals, one_sided_labels, preview_rows
from edgetune.data.problems import RowProblem, RowProblems
from edgetune.data.row_encoder import RowEncoder
from edgetune.data.row_kinds import KINDS, kinds_of
from edgetune.data.row_store import RowStore
from edgetune.data.row_writer import as_messages
from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.errors import ConfigError, DataError
from edgetune.objectives import OBJECTIVES
from tests.cases.rendering import REASONING_TEMPLATE, TOOLS_TEMPLATE, encode, tokenizer_in, write_jsonl
from tests.data import templates
from tests.data.schemes import CONTENTS, SCHEMES, Message, Scheme, conversations

USER, GOOD, BAD = (
    {"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"},
)  # fmt: skip
PROMPT = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
TOOL = {"type": "function", "function": {"name": "dim"}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "dim", "arguments": {}}}],
}

PAIRS: dict[str, Any] = {
    "trl explicit": {"prompt": "q", "chosen": "good", "rejected": "bad"},
    "trl explicit messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "trl implicit messages": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "trl implicit text": {"chosen": "q good", "rejected": "q bad"},
    "ultrafeedback": {"prompt": "q", "messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "llama-factory sharegpt": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    "llama-factory alpaca": {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
    "anthropic hh": {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
    "hh prompt": {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " good", "rejected": " bad"},
    "axolotl chat_template": {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    "axolotl intel": {"question": "q", "chosen": "good", "rejected": "bad", "system": ""},
    "axolotl argilla": {"instruction": "q", "chosen_response": "good", "rejected_response": "bad"},
    "ms-swift": {"messages": [USER, GOOD], "rejected_response": "bad"},
    "ms-swift messages": {"messages": [USER, GOOD], "rejected_messages": [USER, BAD]},
    "answer beside rejected": {"prompt": "q", "response": "good", "rejected_response": "bad"},
    "openai": {"input": {"messages": [USER], "tools": []}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
    "cells of a table": {"prompt": json.dumps([USER]), "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
    "best first": {"prompt": "q", "responses": ["good", "bad"]},
    "scores beside": {"prompt": "q", "responses": ["bad", "good"], "scores": [1, 2.5]},
    "scores within": {
        "instruction": "q",
        "completions": [{"response": "bad", "overall_score": 2}, {"response": "good", "overall_score": "7"}],
    },
    "ranks within": {"prompt": "q", "answers": [{"answer": "bad", "rank": 2}, {"answer": "good", "rank": 1}]},
    "ranks beside": {"messages": [USER], "candidates": ["bad", "good"], "ranks": [2, 1]},
    "several rejected": {"prompt": "q", "chosen": "good", "rejected_responses": ["bad"]},
}  # fmt: skip


def _texts(tokenizer: TextTokenizer, *parts: Sequence[int]) -> list[str]:
    return [tokenizer.decode(part) for part in parts]


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_every_shape_are_the_same_tokens(tmp_path: Path, name: str) -> None:
    encoding = encode(tmp_path, [PAIRS[name]], objective="dpo")
    tokenizer = tokenizer_in(tmp_path / "base")
    (pair,) = encoding.pairs
    assert _texts(tokenizer, pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) == [
        PROMPT, "good<|im_end|>", "bad<|im_end|>",
    ]  # fmt: skip
    assert pair.margin is None
    assert not encoding.usage.unused
    assert [row.input_ids for row in encoding.rows] == [pair.chosen.row.input_ids]
    assert encoding.chats[0].messages == [USER, GOOD]
    assert pair.chosen.answer_mask == [True] * len(pair.chosen_ids)


def test_a_system_prompt_tools_and_a_margin_beside_a_pair_are_used(tmp_path: Path) -> None:
    row = {**PAIRS["trl implicit messages"], "system": "Be brief.", "tools": [TOOL], "margin": 0.5}
    encoding = encode(tmp_path, [row], TOOLS_TEMPLATE, "reward")
    (pair,) = encoding.pairs
    (text,) = _texts(tokenizer_in(tmp_path / "base"), pair.prompt_ids)
    assert "dim" in text
    assert "<|im_start|>system\nBe brief.<|im_end|>\n" in text
    assert pair.margin == 0.5
    assert not encoding.usage.unused


def test_an_answer_of_several_turns_is_one_answer_with_a_mask(tmp_path: Path) -> None:
    chosen = [CALL, {"role": "tool", "content": "done"}, GOOD]
    row = {"prompt": [USER], "chosen": chosen, "rejected": [BAD]}
    (pair,) = encode(tmp_path, [row], TOOLS_TEMPLATE, "dpo").pairs
    tokenizer = tokenizer_in(tmp_path / "base")
    written = [id_ for id_, mask in zip(pair.chosen_ids, pair.chosen.answer_mask, strict=True) if not mask]
    assert "done" in tokenizer.decode(written)
    assert tokenizer.decode(pair.chosen_ids).endswith("good<|im_end|>")


def test_earlier_answers_are_context_alone(tmp_path: Path) -> None:
    talk = [USER, GOOD, {"role": "user", "content": "q2"}]
    encoding = encode(tmp_path, [{"chosen": [*talk, GOOD], "rejected": [*talk, BAD]}], objective="dpo")
    (text,) = _texts(tokenizer_in(tmp_path / "base"), encoding.pairs[0].prompt_ids)
    assert text.endswith("q2<|im_end|>\n<|im_start|>assistant\n")
    assert encoding.untrained_turns == 0


def test_what_stands_beside_whole_conversations_and_differs_is_named(tmp_path: Path) -> None:
    row = {**PAIRS["trl implicit messages"], "prompt": "another"}
    (label,) = encode(tmp_path, [row], objective="dpo").usage.unused
    assert label == "prompt beside chosen and rejected answers that are whole conversations"


@pytest.mark.parametrize(
    ("objective", "columns", "row"),
    [
        ("dpo", {"user": "frage", "chosen": "gut", "rejected": "nein"}, {"frage": "q", "gut": "good", "nein": "bad"}),
        ("dpo", {"messages": "talk", "rejected": "worse"}, {"talk": [USER, GOOD], "worse": "bad"}),
        ("kto", {"label": "daumen"}, {"prompt": "q", "completion": "good", "daumen": True}),
        ("grpo", {"user": "frage"}, {"frage": "q", "answer": "good"}),
        ("pretrain", {"text": "content"}, {"content": "good"}),
    ],
)  # fmt: skip
def test_keys_of_your_own_are_named_by_columns(objective: str, columns: dict[str, str], row: dict[str, Any]) -> None:
    reader = reader_for(objective, "auto", columns)
    read = reader.read(row)
    reader.check_columns()
    assert not read.unread
    assert read.messages == ([] if objective == "pretrain" else [USER] if objective == "grpo" else [USER, GOOD])
    if objective in ("dpo", "kto"):  # refused by name in another objective, whatever the keys are called
        with pytest.raises(RowProblem, match="these are rows for the objective"):
            reader_for("sft", "auto", columns).read(row)


def test_the_longest_row_may_be_a_worse_answer(tmp_path: Path) -> None:
    pair = {"prompt": "q", "chosen": "good", "rejected": "bad" * 9}
    encoding = encode(tmp_path, [pair], objective="dpo")
    assert encoding.longest == len(encoding.pairs[0].rejected.row.input_ids) > encoding.rows.longest
    labels = [{"prompt": "q", "completion": "good" * n, "label": n == 1} for n in (1, 9)]
    assert encode(tmp_path, labels, objective="kto").longest > 40


def test_a_ranked_list_becomes_a_pair_for_each_two_ranks(tmp_path: Path) -> None:
    reader = reader_for("dpo", "auto")
    row = {"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 3, 3], "id": 7}
    rows = list(reader.read_all(row, "f, line 1"))
    found = [
        (r.messages[1]["content"], r.beside.rejected.messages[1]["content"]) for r in rows if isinstance(r.beside, Pair)
    ]
    assert found == [("b", "a"), ("c", "a")]
    assert [r.place for r in rows] == ["f, line 1, answers 2 and 1", "f, line 1, answers 3 and 1"]
    assert [r.unread for r in rows] == [("id",), ()]
    assert reader.describe() == ["ranked answers of 1 row became 2 pairs: one for each two answers of different ranks"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "q", "chosen": "good", "rejected": " good\n"}, "chosen and rejected are equal answers"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "chosen and rejected are equal answers"),
        ({"chosen": "same text", "rejected": "same text"}, "chosen and rejected are equal"),
        ({"prompt": "q", "responses": ["a", "a"]}, r"responses\[1\] and responses\[2\] are equal answers"),
        ({"prompt": "q", "chosen": "", "rejected": ""}, "chosen and rejected are equal answers"),
        ({"prompt": "q", "responses": ["a"]}, "responses is not a list of several answers"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, 1]}, "all answers of responses have the same score"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1]}, "scores has 1 numbers for 2 answers"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": ["x", 1]}, "scores is 'x', not a number"),
        ({"prompt": "q", "responses": [{"text": "a", "score": 1}, {"text": "b"}]}, "1 of 2 answers have no score"),
        ({"prompt": "q", "responses": [{"model": "a"}, "b"]}, r"responses\[1\] has no text; its keys are model"),
        ({"chosen": "a", "rejected": "b"}, "chosen and rejected have no prompt: none stands beside them"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "x"}, BAD]}, "differ before an answer: message 1"),
        ({"chosen": [USER], "rejected": [USER, BAD]}, "chosen ends without an answer"),
        ({"messages": [USER, GOOD], "chosen": "other", "rejected": "b"}, "the prompt ends with an answer"),
        ({"messages": [GOOD], "chosen": "good", "rejected": "b"}, "has no prompt: no message precedes the answers"),
        ({"messages": [USER], "rejected_response": "b"}, "messages end without an answer that rejected_response"),
        ({"prompt": "q", "chosen": ["a", "b"], "rejected": "c"}, "chosen is a list of 2 texts"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "x"}, "margin is 'x', not a number"),
        ({"prompt": "q", "chosen": "a\ud83d", "rejected": "b"}, "half a character"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "images": ["x"]}, "images is not empty"),
        ({"foo": 1}, "in no known format; its keys are foo; looked for chosen"),
        ({"prompt": "a", "chosen": "x"}, "has chosen and no rejected answer beside it"),
        ({"prompt": "a", "chosen": None, "rejected": "x"}, "has rejected and no chosen answer beside it"),
    ],
)  # fmt: skip
def test_pairs_that_teach_nothing_or_cannot_be_read_are_refused(row: Any, problem: str) -> None:
    with pytest.raises(RowProblem, match=problem):
        list(reader_for("dpo", "auto").read_all(row))


def test_equal_answers_are_skipped_and_counted_on_request(tmp_path: Path) -> None:
    rows = [PAIRS["trl explicit"], {"prompt": "q", "chosen": "x", "rejected": "x"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows * 2)
    with pytest.raises(
        DataError, match=r"rows.jsonl, line 2: chosen and rejected are equal answers.*1 more row"
    ) as caught:
        read_splits(DataConfig(train=path), 0, objective="dpo")
    assert "data.on_bad_row: skip" in str(caught.value.hint)
    problems = RowProblems(skip=True)
    splits = read_splits(DataConfig(train=path, on_bad_row="skip"), 0, problems, "dpo")
    assert (len(splits.train), len(splits.validation), problems.count) == (1, 1, 2)


LABELS: list[tuple[dict[str, Any], bool]] = [
    ({"prompt": "q", "completion": "good", "label": True}, True),
    ({"prompt": [USER], "completion": [GOOD], "label": False}, False),
    ({"messages": [USER, GOOD], "label": "false"}, False),
    ({"instruction": "q", "input": "", "output": "good", "kto_tag": True}, True),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "good"}], "kto_tag": 0}, False),
    ({"question": "q", "answer": "good", "thumbs_up": 1}, True),
    ({"question": "q", "answer": "good", "thumbs_down": True}, False),
    ({"question": "q", "answer": "good", "thumbs": "Thumbs down"}, False),
    ({"question": "q", "answer": "good", "preference": "TRUE"}, True),
    ({"question": "q", "answer": "good", "feedback": "negative"}, False),
]


@pytest.mark.parametrize(("row", "label"), LABELS, ids=str)
def test_labels_of_every_shape_are_read(tmp_path: Path, row: dict[str, Any], label: bool) -> None:
    rows = [row, {"prompt": "q", "completion": "good", "label": True}]
    encoding = encode(tmp_path, rows, objective="kto")
    first = encoding.labelled[0]
    texts = _texts(tokenizer_in(tmp_path / "base"), first.prompt_ids, first.completion_ids)
    assert texts == [PROMPT, "good<|im_end|>"]
    assert first.label is label
    assert encoding.labelled.desirable == len(encoding.rows) == len(encoding.chats) == 1 + label
    assert not encoding.usage.unused


def test_the_last_answer_is_the_one_that_a_label_rates(tmp_path: Path) -> None:
    row = {"messages": [USER, BAD, USER, GOOD], "label": True}
    (labelled,) = encode(tmp_path, [row], objective="kto").labelled
    prompt, answer = _texts(tokenizer_in(tmp_path / "base"), labelled.prompt_ids, labelled.completion_ids)
    assert prompt == PROMPT + "bad<|im_end|>\n" + PROMPT
    assert answer == "good<|im_end|>"


def test_answers_are_measured_where_none_is_desirable(tmp_path: Path) -> None:
    encoding = encode(tmp_path, [LABELS[1][0]], objective="kto")
    assert (len(encoding.rows), encoding.labelled.desirable, encoding.items) == (1, 0, 1)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([True, True], "all 2 answers that are trained on are desirable"),
        ([False], "all 1 answers that are trained on are undesirable"),
        ([True, False], ""),
    ],
)
def test_labels_of_one_kind_alone_are_told(tmp_path: Path, labels: list[bool], said: str) -> None:
    rows = [{"prompt": f"q {n}", "completion": "a", "label": label} for n, label in enumerate(labels)]
    lines = one_sided_labels(encode(tmp_path, rows, objective="kto"))
    assert bool(lines) == bool(said)
    assert said in "".join(lines)


def test_an_epoch_passes_over_answers_of_both_labels(tmp_path: Path) -> None:
    rows = [{"prompt": f"q {n}", "completion": "a", "label": n == 0} for n in range(5)]
    encoding = encode(tmp_path, rows, objective="kto")
    assert (len(encoding.rows), encoding.examples) == (1, 5)


@pytest.mark.parametrize("value", [2, "maybe", [True], 0.5])
def test_a_label_that_is_neither_true_nor_false_is_refused(value: Any) -> None:
    with pytest.raises(RowProblem, match=r"label is .*, which is neither true nor false"):
        reader_for("kto", "auto").read({"prompt": "q", "completion": "a", "label": value})


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": "q", "ground_truth": 72}, {"ground_truth": 72}),
        ({"prompt": [USER], "solution": "x"}, {"solution": "x"}),
        ({"question": "q", "answer": "72"}, {"answer": "72"}),
        ({"messages": [USER], "task": {"kind": "math"}}, {"task": {"kind": "math"}}),
        ({"problem": "q"}, {}),
        ({"instruction": "q", "input": "", "output": "x", "chosen": None}, {"output": "x", "chosen": None}),
    ],
    ids=str,
)
def test_prompts_keep_the_columns_of_their_rows(tmp_path: Path, row: dict[str, Any], columns: dict[str, Any]) -> None:
    encoding = encode(tmp_path, [row], objective="grpo")
    (prompt,) = encoding.prompts
    assert _texts(tokenizer_in(tmp_path / "base"), prompt.prompt_ids) == [PROMPT]
    assert prompt.columns == columns
    assert prompt.messages == [USER]
    assert prompt.place == "rows.jsonl, line 1"
    assert encoding.rows[0].input_ids[: len(prompt.prompt_ids)] == prompt.prompt_ids


def test_a_prompt_without_room_for_an_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"line 1: the prompt has \d+ tokens, which leaves no room for an answer within"
    ):
        encode(tmp_path, [{"prompt": "q" * 100}], objective="rloo", length=20)


def test_distillation_takes_conversations_or_prompts_and_no_mixture(tmp_path: Path) -> None:
    assert len(encode(tmp_path, [{"messages": [USER, GOOD]}], objective="distillation").rows) == 1
    assert len(encode(tmp_path, [{"prompt": "q"}, {"messages": [USER]}], objective="distillation").prompts) == 2
    with pytest.raises(DataError, match="1 of 2 rows have no answer: distillation takes prompts alone or"):
        encode(tmp_path, [{"messages": [USER, GOOD]}, {"prompt": "q"}], objective="distillation")


def test_pairs_are_cut_at_max_length_and_dropped_when_nothing_tells_them_apart(tmp_path: Path) -> None:
    prompt = len(encode(tmp_path, [PAIRS["trl explicit"]], objective="dpo").pairs[0].prompt_ids)
    rows = [
        {"prompt": "q", "chosen": "a" * 30, "rejected": "b"},
        {"prompt": "q", "chosen": "c" * 30 + "x", "rejected": "c" * 30 + "y"},
        {"prompt": "q" * 50, "chosen": "a", "rejected": "b"},
        PAIRS["trl explicit"],
    ]
    encoding = encode(tmp_path, rows, objective="dpo", length=prompt + 8)
    assert (len(encoding.pairs), encoding.truncated, encoding.dropped) == (2, 3, 2)
    assert len(encoding.pairs[0].chosen.row.input_ids) == prompt + 8
    assert encoding.summary()["pairs"] == 2


CASES_OF_KINDS: dict[str, list[Any]] = {
    "conversation": [{"messages": [USER, GOOD]}, {"instruction": "q", "output": "a"}],
    "pair": [PAIRS["trl explicit"], PAIRS["ms-swift"], PAIRS["best first"]],
    "labelled": [LABELS[0][0], {"messages": [USER, GOOD], "kto_tag": False}],
    "text": [{"text": "Lamps."}],
    "prompt": [{"prompt": "q"}, {"messages": [USER]}],
}
ACCEPTED = {
    ("conversation", "prompt", 1), ("labelled", "prompt", 0), ("pair", "prompt", 2),
}  # fmt: skip
"""Rows whose answers and labels reach the reward functions: kind, kind that is wanted, number."""


@pytest.mark.parametrize("kind", CASES_OF_KINDS)
@pytest.mark.parametrize("objective", ["sft", "dpo", "reward", "kto", "grpo", "pretrain"])
def test_rows_of_one_objective_given_to_another_are_refused_by_name(kind: str, objective: str) -> None:
    if kind in kinds_of(objective):
        for row in CASES_OF_KINDS[kind]:
            assert list(reader_for(objective, "auto").read_all(row))
        return
    for number, row in enumerate(CASES_OF_KINDS[kind]):
        if (kind, kinds_of(objective)[0], number) in ACCEPTED:
            continue
        with pytest.raises(RowProblem) as caught:
            list(reader_for(objective, "auto").read_all(row))
        text = str(caught.value)
        if kind == "prompt" and objective in ("sft", "kto") and "these are rows" not in text:
            assert "prompts alone are rows for the objectives grpo" in text or "has no assistant message" in text
            continue
        named = kind if "end with an answer" not in text else "conversation"
        assert ", ".join(KINDS[named].objectives) + f"; the objective here is {objective}" in text


def test_every_objective_has_a_kind_of_rows_and_a_reader() -> None:
    assert {name for kind in KINDS.values() for name in kind.objectives} == OBJECTIVES.keys()
    for name in OBJECTIVES:
        assert kinds_of(name) in READERS
    with pytest.raises(ConfigError, match=r"data\.format is alpaca, and the objective dpo takes preference pairs"):
        reader_for("dpo", "alpaca")


def test_rows_of_every_kind_are_kept_in_the_store() -> None:
    rows = [
        ChatRow([USER, GOOD], place="a", beside=Pair(ChatRow([USER, BAD], unread=("x",)), 1, 0.5)),
        ChatRow([USER, GOOD], beside=Label(False)),
        ChatRow([USER], [TOOL], frozenset(), "b", {}, (), {}, {}, Columns({"answer": [1, {"a": None}]})),
        ChatRow([], unread=("url",), beside=PlainText("Lamps.")),
    ]
    assert list(RowStore(rows)) == rows


@pytest.mark.parametrize(
    ("objective", "row"),
    [
        *(("dpo", row) for row in PAIRS.values()),
        *(("kto", row) for row, _ in LABELS),
        ("dpo", {"prompt": [USER, GOOD, USER], "chosen": [CALL], "rejected": [{**BAD, "weight": 0}], "tools": [TOOL]}),
        ("dpo", {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 2, "system": "Be brief."}),
        ("kto", {"messages": [USER, BAD, USER, GOOD], "label": True}),
        ("grpo", {"question": "q", "answer": "72", "level": None, "label": True, "tools": [TOOL]}),
        ("pretrain", {"text": "Lamps."}),
        ("distillation", {"messages": [USER, GOOD]}),
        ("distillation", {"messages": [USER], "task": 3}),
    ],
    ids=str,
)
def test_written_rows_read_again_are_the_same(objective: str, row: Any) -> None:
    reader = reader_for(objective, "auto")
    for first in reader.read_all(row):
        again = reader.read(json.loads(json.dumps(as_messages(first))), first.place)
        assert again == first


class _Holder:
    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer

    def __repr__(self) -> str:
        return "tokenizer"


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> _Holder:
    return _Holder(tokenizer_in(tmp_path_factory.mktemp("tokenizer")))


@settings(deadline=None)
@given(
    scheme=SCHEMES, earlier=conversations(), asked=st.text(max_size=8),
    answers=st.lists(st.text(max_size=8), min_size=2, max_size=2, unique_by=str.strip),
)  # fmt: skip
def test_both_rows_of_a_pair_begin_with_the_tokens_of_the_prompt(
    held: _Holder, scheme: Scheme, earlier: list[Message], asked: str, answers: list[str]
) -> None:
    template = ChatTemplate(scheme.jinja(), None, "<|im_end|>")
    prompt = [*earlier, {"role": "user", "content": asked}]
    row, other = (
        ChatRow([*prompt, {"role": "assistant", "content": text}], untrained=frozenset(range(len(prompt))))
        for text in answers
    )
    row.beside = Pair(other, len(prompt))
    result = EncodedSplit()
    RowEncoder(template, held.tokenizer, 10_000, result).add(row)
    given_ids = held.tokenizer.encode(template.render(prompt, add_generation_prompt=True))[0]
    for pair in result.pairs:
        for side in (pair.chosen, pair.rejected):
            assert side.prompt_ids == given_ids
            assert side.row.input_ids[: len(given_ids)] == given_ids
            assert side.answer_ids[-1] in held.tokenizer.ending_ids
            assert side.answer_mask == [True] * len(side.answer_ids)
    assert len(result.pairs) == 1 or (answers[0] != answers[1] and scheme.trims)


@settings(deadline=None)
@given(asked=CONTENTS, answers=st.lists(CONTENTS, min_size=2, max_size=2, unique_by=str.strip))
def test_random_pairs_of_several_shapes_are_the_same_messages(asked: str, answers: list[str]) -> None:
    good, bad = ({"role": "assistant", "content": text} for text in answers)
    user = {"role": "user", "content": asked}
    shapes: list[dict[str, Any]] = [
        {"prompt": [user], "chosen": [good], "rejected": [bad]},
        {"chosen": [user, good], "rejected": [user, bad]},
        {"messages": [user], "chosen": good, "rejected": bad},
        {"messages": [user, good], "rejected_messages": [user, bad]},
        {"messages": [user, good], "rejected_response": [bad]},
        {"messages": [user], "responses": [bad, good], "ranks": [2, 1]},
        {"prompt": json.dumps([user]), "chosen": json.dumps([good]), "rejected": json.dumps([bad])},
        {"input": {"messages": [user]}, "preferred_output": [good], "non_preferred_output": [bad]},
    ]
    for row in shapes:
        read = reader_for("dpo", "auto").read(row)
        assert isinstance(read.beside, Pair)
        assert (read.messages, read.beside.rejected.messages, read.beside.prompt) == ([user, good], [user, bad], 1)
        assert not read.unread


def test_pairs_of_one_prompt_are_held_out_together() -> None:
    rows = [
        ChatRow([{"role": "user", "content": str(prompt)}, GOOD], beside=Pair(ChatRow([USER, BAD]), 1))
        for prompt in range(20)
        for _ in range(5)
    ]
    for seed in range(5):
        kept, held = hold_out(RowStore(rows), 0.1, seed)
        assert not {row.messages[0]["content"] for row in kept} & {row.messages[0]["content"] for row in held}
        assert (len(kept), len(held)) == (90, 10)
    kept, held = hold_out(RowStore(rows[:5]), 0.2, 0)
    assert (len(kept), len(held)) == (4, 1)


def test_test_rows_are_conversations_whatever_the_objective(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [PAIRS["trl explicit"]] * 3)
    test = write_jsonl(tmp_path / "test.jsonl", [{"prompt": "q", "completion": "a"}])
    assert len(read_splits(DataConfig(train=train, test=test), 0, objective="dpo").test) == 1
    with pytest.raises(DataError, match=r"has chosen and rejected: these are rows .*; data.test takes conversations"):
        read_splits(DataConfig(train=train, test=train), 0, objective="dpo")


@pytest.mark.parametrize(
    ("objective", "row", "heading", "totals"),
    [
        ("dpo", PAIRS["trl explicit"], "pair 1, rejected: ", "1 pair, of whose chosen answers: 1 row, "),
        ("kto", LABELS[0][0], "answer 1, desirable: ", "1 labelled answers, 1 of them desirable"),
        ("grpo", {"prompt": "q", "answer": "72"}, "prompt 1 (answer='72'): ", "1 prompt with answer for the reward"),
        ("pretrain", {"text": "Lamps."}, "block 1: ", "1 document packed into blocks: 1 row, "),
    ],
)  # fmt: skip
def test_preview_shows_what_the_objective_reads(
    tmp_path: Path, objective: str, row: Any, heading: str, totals: str
) -> None:
    encoding = encode(tmp_path, [row], objective=objective)
    lines = [text.plain for text in preview_rows(encoding, tokenizer_in(tmp_path / "base"), 3, color=False)]
    assert any(line.startswith(heading) for line in lines)
    assert format_totals(encoding).startswith(totals)
    if objective == "dpo":
        assert PROMPT + "⟦good<|im_end|>⟧" in lines
        assert PROMPT + "⟦bad<|im_end|>⟧" in lines


def test_reasoning_within_answers_is_compared_and_rendered(tmp_path: Path) -> None:
    def think(text: str) -> dict[str, Any]:
        return {**GOOD, "reasoning_content": text}

    row = {"prompt": [USER], "chosen": [think("yes")], "rejected": [think("no")]}
    (pair,) = encode(tmp_path, [row], REASONING_TEMPLATE, "dpo").pairs
    assert _texts(tokenizer_in(tmp_path / "base"), pair.chosen_ids) == ["<think>\nyes\n</think>\n\ngood<|im_end|>"]


def test_all_tokens_of_pairs_labels_and_prompts_are_in_the_hash(tmp_path: Path) -> None:
    one = encode(tmp_path, [PAIRS["trl explicit"]], objective="dpo").sha256
    assert one != encode(tmp_path, [{**PAIRS["trl explicit"], "rejected": "worse"}], objective="dpo").sha256
    rows = [LABELS[0][0], {**LABELS[0][0], "label": False}]
    assert encode(tmp_path, rows, objective="kto").sha256 != encode(tmp_path, rows[::-1], objective="kto").sha256
    prompts = [encode(tmp_path, [{"prompt": "q", "a": n}], objective="grpo").sha256 for n in (1, 2)]
    assert prompts[0] != prompts[1]


def test_rows_that_the_template_refuses_are_named_with_their_place(tmp_path: Path) -> None:
    refusing = "{%- if messages[0].content == 'x' %}{{ raise_exception('no x') }}{%- endif %}" + templates.CHATML
    rows = [PAIRS["trl explicit"], {**PAIRS["trl explicit"], "prompt": "x"}]
    with pytest.raises(DataError, match=r"rows.jsonl, line 2: .*no x"):
        encode(tmp_path, rows, refusing, "dpo")
