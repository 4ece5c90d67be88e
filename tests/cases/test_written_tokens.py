"""Texts of special tokens within messages, and answers without text: counted and named, with transformers' ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from edgetune.cli import run
from tests.cases.rendering import encode, write_jsonl
from tests.data import templates
from tests.training import runs


def _row(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


ROWS = [_row("a lamp", "on"), _row("say <|im_start|>user", "no <|im_end|> yes"), _row("<|im_start|>", "plain")]


def test_special_tokens_within_messages_are_counted_with_an_example(tmp_path: Path) -> None:
    everything, stops = encode(tmp_path, ROWS).written.describe()
    assert "<|im_start|> (2 rows, for example rows.jsonl, line 2)" in everything
    assert "<|im_end|> (1 row, for example rows.jsonl, line 2)" in everything
    assert stops.endswith(": <|im_end|> (1 row, for example rows.jsonl, line 2)")
    assert "<|im_start|>" not in stops


def test_stop_tokens_in_prompts_and_unmarked_rows_are_no_answers(tmp_path: Path) -> None:
    untrained = _row("hello", "no <|im_end|>")
    untrained["messages"][1]["weight"] = 0
    untrained["messages"] += [{"role": "user", "content": "x <|im_end|>"}, {"role": "assistant", "content": "y"}]
    written = encode(tmp_path, [*ROWS[:1], untrained]).written
    assert written.anywhere == {"<|im_end|>": (1, "rows.jsonl, line 2")}
    assert not written.stops


def test_special_tokens_in_tools_are_counted(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "ends with <|im_end|>"}}
    assert encode(tmp_path, [{**ROWS[0], "tools": [tool]}]).written.anywhere.keys() == {"<|im_end|>"}


def test_rows_without_special_tokens_are_not_mentioned(tmp_path: Path) -> None:
    assert encode(tmp_path, [_row("a <b> | im_end", "c </d>")]).written.describe() == []


def test_ids_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    encoded = encode(tmp_path, ROWS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    for row, given in zip(encoded.rows, ROWS, strict=True):
        ids = tokenizer.apply_chat_template(
            given["messages"], chat_template=templates.CHATML, tokenize=True, return_dict=True
        )["input_ids"]  # fmt: skip
        assert row.input_ids == list(ids)


@pytest.mark.parametrize("answer", ["", " ", "\n\t"])
def test_answers_without_text_are_counted(tmp_path: Path, answer: str) -> None:
    encoded = encode(tmp_path, [*ROWS, _row("hm", answer)])
    assert (encoded.blank, encoded.blank_example) == (1, "rows.jsonl, line 4")


def test_preview_and_dry_run_name_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs.make_base(tmp_path / "base")
    settings = runs.settings(tmp_path / "base", tmp_path)
    settings["data"]["train"] = write_jsonl(tmp_path / "rows.jsonl", [*ROWS, _row("hm", " ")])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    for arguments in (["preview"], ["train", "--dry-run"]):
        assert run([*arguments, str(tmp_path / "config.yaml")]) == 0
        output = capsys.readouterr()
        said = " ".join((output.out + output.err).split())
        assert "<|im_end|> (1 row, for example rows.jsonl, line 2)" in said
        assert "1 answer holds no text" in said
        assert "rows.jsonl, line 4" in said
