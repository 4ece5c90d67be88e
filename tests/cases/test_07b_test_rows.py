"""Test rows are rendered, tokenized and encoded before training; other ones keep the trained adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgetune import cli
from edgetune.training import environment
from edgetune_converters.files.contents import sha256_of
from tests.training import runs

ALTERNATING = """\
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user and assistant') }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
HALF = "On \ude00."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with environment.silence_libraries():
        return runs.make_base(tmp_path_factory.mktemp("base") / "base")


def _talk(*texts: str, roles: str = "ua") -> dict[str, Any]:
    names = {"u": "user", "a": "assistant", "s": "system"}
    return {"messages": [{"role": names[roles[i]], "content": text} for i, text in enumerate(texts)]}


def _write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _config(base: Path, folder: Path, **data: Any) -> Path:
    values = runs.settings(base, folder, max_steps=2)
    (folder / "alternating.jinja").write_text(ALTERNATING)
    values["data"] |= {"chat_template": "alternating.jinja", "test": None, **data}
    return runs.write_config(folder / "config.yaml", values)


def _edgetune(*arguments: object) -> int:
    return cli.run([str(argument) for argument in arguments])


GOOD = _talk("Lamp 60?", "On.")


@pytest.mark.parametrize(
    ("data", "bad", "words"),
    [
        ({}, _talk("Lamp?", "There?", "Yes.", roles="uua"), "the chat template refuses a conversation"),
        ({}, _talk(HALF, "On."), "holds half a character (U+DE00"),
        ({}, _talk("Lamp?", HALF), "holds half a character (U+DE00"),
        ({}, _talk("Hello.", roles="a"), "has no prompt: no message precedes the expected answer"),
        ({"answer": "json"}, _talk("Lamp?", "{on"), "the expected answer '{on' is not JSON"),
        ({"answer": "number"}, _talk("Lamp?", "none"), "the expected answer 'none' holds no number"),
        ({"answer": "regex"}, _talk("Lamp?", "(1"), "the expected answer '(1' is not a regular expression"),
        ({"answer": "choice", "choices": ["On.", "Off."]}, _talk("Lamp?", "Dim."), "'Dim.' is none of data.choices"),
    ],
)  # fmt: skip
def test_a_bad_test_row_is_named_by_dry_run_and_preview(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], data: dict[str, Any], bad: Any, words: str
) -> None:
    first = {"json": "1", "number": "1", "regex": "1"}.get(data.get("answer", ""), "On.")
    _write(tmp_path / "held.jsonl", _talk("Lamp 60?", first), _talk("Lamp 61?", first), bad)
    config = _config(base, tmp_path, test="held.jsonl", **data)
    for command in (["train", config, "-o", tmp_path / "run", "--dry-run"], ["preview", config]):
        assert _edgetune(*command) == 1
        said = " ".join(capfd.readouterr().err.split())
        assert "held.jsonl, line 3: " in said
        assert words in said


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        (["On.", HALF], "an entry of data.choices holds half a character (U+DE00"),
        (["On.", ""], "the choice '' adds no token to the prompt"),
    ],
)
def test_a_bad_choice_is_found_before_training(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], choices: list[str], words: str
) -> None:
    _write(tmp_path / "held.jsonl", GOOD)
    config = _config(base, tmp_path, test="held.jsonl", answer="choice", choices=choices)
    assert _edgetune("train", config, "-o", tmp_path / "run", "--dry-run") == 1
    assert words in " ".join(capfd.readouterr().err.split())


def test_skipped_rows_are_left_out_of_the_test_rows(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path / "held.jsonl", GOOD, _talk("Hello.", roles="a"), GOOD)
    config = _config(base, tmp_path, test="held.jsonl", on_bad_row="skip")
    assert _edgetune("preview", config) == 0
    out = " ".join(capfd.readouterr().out.split())
    assert "checked too: 8 held-out rows, 2 test rows" in out
    assert "1 row is left out (data.on_bad_row: skip): held.jsonl, line 2: has no prompt" in out


def _adapter(run: Path) -> str:
    return sha256_of(run / "adapter/adapter_model.safetensors")


def _task(run: Path) -> Any:
    return json.loads((run / "reference/reference.json").read_text())["task"]


def test_other_test_rows_recapture_the_reference_and_keep_the_adapter(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path / "held.jsonl", GOOD)
    config, run = _config(base, tmp_path, test="held.jsonl"), tmp_path / "run"

    def fails(*_: object) -> None:
        raise OSError("the machine was switched off")

    with monkeypatch.context() as patched:
        patched.setattr("edgetune.training.capture.reference.capture_task_answers", fails)
        assert _edgetune("train", config, "-o", run) == 1
    trained = _adapter(run)
    resume = ("train", config, "-o", run, "--resume")
    _write(tmp_path / "held.jsonl", GOOD, _talk("Lamp 61?", "Off."))
    assert _edgetune(*resume) == 0  # of the unfinished run
    assert _adapter(run) == trained
    assert [row["expected"] for row in _task(run)["rows"]] == ["On.", "Off."]
    capfd.readouterr()
    assert _edgetune(*resume) == 0
    assert "there is nothing to resume" in capfd.readouterr().err
    for settings, expected in (
        (["data.answer=choice", "data.choices=[On., Off.]"], ("choice", 2)),
        (["data.answer=regex", "reference.task_rows=1"], ("regex", 1)),
        (["data.test="], None),
    ):
        options = [word for each in settings for word in ("--set", each)]
        assert _edgetune(*resume, *options) == 0
        said = capfd.readouterr().err
        assert "keeps its adapter; recapturing the reference" in said
        assert "the test rows or their answers changed" in said
        assert _adapter(run) == trained
        task = _task(run)
        assert task is None or (task["kind"], len(task["rows"])) == expected
        assert (task is None) == (expected is None)
        assert _edgetune(*resume, *options) == 0
        assert "there is nothing to resume" in capfd.readouterr().err


def test_bad_rows_of_reference_are_named_before_the_base_is_loaded(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = _config(base, tmp_path), tmp_path / "run"
    assert _edgetune("train", config, "-o", run) == 0
    monkeypatch.setattr("edgetune.training.capture.recapture.load_model", None)
    for bad, words in (
        (_talk("Lamp?", "There?", "Yes.", roles="uua"), "roles must alternate"),
        (_talk(HALF, "On."), "holds half a character"),
    ):
        _write(tmp_path / "more.jsonl", GOOD, bad)
        assert _edgetune("reference", run, "--rows", tmp_path / "more.jsonl") == 1
        said = " ".join(capfd.readouterr().err.split())
        assert "more.jsonl, line 2: " in said
        assert words in said
