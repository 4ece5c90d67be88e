"""Rows that the template refuses are all named, with half characters among them, or left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgetune.config import DataConfig
from edgetune.data.chat import ChatTemplate
from edgetune.data.dataset import encode_all, read_splits
from edgetune.data.problems import RowProblems
from edgetune.errors import DataError
from tests.cases.rendering import encode, tokenizer_in, write_jsonl
from tests.data import templates

ALTERNATING = (
    "{%- for m in messages %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles must alternate') }}{%- endif %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
GOOD = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def _rows(awkward: Any) -> list[Any]:
    return [{"messages": awkward if number in (17, 31) else GOOD} for number in range(1, 51)]


@pytest.mark.parametrize(
    ("awkward", "template", "problem"),
    [
        ([{"role": "assistant", "content": "Hello"}, *GOOD], ALTERNATING, "roles must alternate"),
        ([GOOD[0], *GOOD], ALTERNATING, "roles must alternate"),
        ([*GOOD, {"role": "system", "content": "s"}, *GOOD], ALTERNATING, "roles must alternate"),
    ],
)
def test_all_rows_that_the_template_refuses_are_named(
    tmp_path: Path, awkward: Any, template: str, problem: str
) -> None:
    with pytest.raises(DataError) as caught:
        encode(tmp_path, _rows(awkward), template)
    assert caught.value.message.startswith("rows.jsonl, line 17: ")
    assert problem in caught.value.message
    assert caught.value.message.endswith("(and 1 more row: rows.jsonl, line 31)")
    assert "data.on_bad_row: skip" in str(caught.value.hint)


def _config(folder: Path, rows: list[Any], **options: Any) -> DataConfig:
    return DataConfig(train=write_jsonl(folder / "train.jsonl", rows), validation_fraction=0.1, **options)


def test_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    config = _config(tmp_path, [*_rows([GOOD[0], *GOOD]), {"x": 1}], on_bad_row="skip")
    problems = RowProblems(skip=True)
    splits = read_splits(config, 0, problems)
    tokenizer = tokenizer_in(tmp_path / "base")
    kept = 0
    for rows in (splits.train, splits.validation):
        kept += len(encode_all(ChatTemplate(ALTERNATING), tokenizer, rows, 99, problems).rows)
    assert (kept, problems.count, len(problems.rows)) == (48, 3, 3)
    assert problems.rows[0].startswith("train.jsonl, line 51: in no known format")
    assert {row.split(":")[0] for row in problems.rows[1:]} == {"train.jsonl, line 17", "train.jsonl, line 31"}


def test_stopping_is_the_default(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train.jsonl, line 3: in no known format"):
        read_splits(_config(tmp_path, [{"messages": GOOD}, {"messages": GOOD}, {"x": 1}]), 0)


def test_a_file_of_bad_rows_only_is_refused_even_if_rows_are_skipped(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train.jsonl, line 1: in no known format"):
        read_splits(_config(tmp_path, [{"x": 1}] * 3, on_bad_row="skip"), 0)


HALF = "Lamp \ud83d here?"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": HALF}, GOOD[1]]},
        {"messages": [GOOD[0], {"role": "assistant", "content": HALF}]},
        {"messages": [{"role": "system", "content": HALF}, *GOOD]},
        {"messages": GOOD, "tools": [{"name": HALF}]},
        {"messages": GOOD, "tools": [{HALF: 1}]},
        {"messages": [GOOD[0], {**GOOD[1], "thinking": HALF}]},
        {"prompt": HALF, "completion": "a"},
    ],
)
def test_half_an_emoji_is_a_problem_of_its_row(tmp_path: Path, row: Any) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl, line 2: holds half a character \(U\+D83D"):
        encode(tmp_path, [{"messages": GOOD}, row])


def test_a_whole_emoji_in_two_escapes_is_one_character(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    lamp = {"messages": [{"role": "user", "content": "Lamp \U0001f4a1 here?"}, GOOD[1]]}
    assert "\\ud83d\\udca1" in Path(write_jsonl(tmp_path / "rows" / "a.jsonl", [lamp])).read_text()
    tokenizer = tokenizer_in(tmp_path / "base")
    assert "\U0001f4a1" in tokenizer.decode(encode(tmp_path, [lamp]).rows[0].input_ids)


def test_half_an_emoji_in_the_template_is_said() -> None:
    with pytest.raises(DataError, match=r"the chat template holds half a character \(U\+D83D\)"):
        ChatTemplate(templates.CHATML + "\ud83d").render(GOOD)
