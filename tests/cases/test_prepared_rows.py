"""What is prepared for a training: problems of all splits at once, skipped rows in the run, and expected answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgetune.config import load_config
from edgetune.errors import DataError
from edgetune.planning.prepare import PreparedRun, prepare_run, print_overview
from edgetune.training.resume import changed_options
from tests.cases.rendering import TOOLS_TEMPLATE, write_jsonl
from tests.training import runs

pytest.importorskip("torch")
NEW_OPTIONS = {"on_bad_row": "stop", "columns": {"user": None}, "roles": {}}
GOOD = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
HALF = [{"role": "user", "content": "\ud83d"}, GOOD[1]]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "dim", "arguments": {"level": 3}}}]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_base(tmp_path_factory.mktemp("base"))


def _prepare(base: Path, folder: Path, test: list[Any], *overrides: str, train: list[Any] | None = None) -> PreparedRun:
    (folder / "tools.jinja").write_text(TOOLS_TEMPLATE)
    write_jsonl(folder / "train.jsonl", train or [{"messages": GOOD, "id": number} for number in range(3)])
    write_jsonl(folder / "test.jsonl", [{"messages": row} for row in test])
    (folder / "config.yaml").write_text(
        f"base: {base}\ndata: {{train: train.jsonl, validation: train.jsonl, test: test.jsonl,"
        " chat_template: tools.jinja}\n"
    )
    return prepare_run(load_config(folder / "config.yaml", overrides))


def test_problems_of_all_splits_are_one_message(base: Path, tmp_path: Path) -> None:
    bad = [{"messages": GOOD}, {"messages": [GOOD[0], {"role": "tool", "content": 1}, GOOD[1]]}, {"x": 1}]
    with pytest.raises(DataError) as caught:
        _prepare(base, tmp_path, [GOOD, HALF], train=bad)
    assert "train.jsonl, line 3: in no known format" in caught.value.message
    assert "test.jsonl, line 2: holds half a character (U+D83D" in caught.value.message


def test_a_call_as_the_expected_answer_is_its_rendered_text(base: Path, tmp_path: Path) -> None:
    prepared = _prepare(base, tmp_path, [[GOOD[0], CALL], GOOD])
    assert [task.expected.strip() for task in prepared.task] == [
        '<call>dim {"level": 3}</call>',
        "a",
    ]


def test_an_answer_that_a_flag_excludes_is_not_expected(base: Path, tmp_path: Path) -> None:
    excluded = {"role": "assistant", "content": "bad", "weight": 0}
    prepared = _prepare(base, tmp_path, [[*GOOD, GOOD[0], excluded]])
    assert [task.expected for task in prepared.task] == ["a"]
    with pytest.raises(DataError, match=r"test.jsonl, line 1: has no expected answer"):
        _prepare(base, tmp_path, [[GOOD[0], excluded]])


def test_skipped_rows_are_listed_in_the_run(base: Path, tmp_path: Path) -> None:
    prepared = _prepare(base, tmp_path, [GOOD, HALF], "data.on_bad_row=skip")
    assert len(prepared.task) == 1
    skipped = prepared.data_identity["skipped"]
    assert skipped["count"] == 1
    assert skipped["rows"][0].startswith("test.jsonl, line 2: holds half a character")
    assert "skipped" not in _prepare(base, tmp_path, [GOOD]).data_identity


def test_the_overview_names_unused_keys_and_skipped_rows(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_overview(_prepare(base, tmp_path, [GOOD, HALF], "data.on_bad_row=skip"))
    said = " ".join("".join(capsys.readouterr()).split())
    assert "keys that are not used: id: 6 rows, for example train.jsonl, line 1" in said
    assert "1 row is left out (data.on_bad_row: skip): - test.jsonl, line 2" in said


def test_half_a_character_in_the_choices_is_said(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"an entry of data.choices holds half a character \(U\+D83D"):
        _prepare(base, tmp_path, [GOOD], "data.answer=choice", 'data.choices=["a", "\\ud83d"]')


def test_runs_of_before_the_option_can_be_resumed() -> None:
    assert changed_options({"data": {"train": "x"}}, {"data": {"train": "x", **NEW_OPTIONS}}) == []
