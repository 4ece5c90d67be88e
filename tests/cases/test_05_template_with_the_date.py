"""A template that prints the day: the day of the training is kept, and checked files keep passing on later days."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from edgetune import cli, runtime
from edgetune.runs.directory import RunDirectory
from edgetune.training import environment
from edgetune_converters.files.contents import sha256_of
from tests.training import runs

BODY = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
DAY = "{{- '<|im_start|>system\\nToday is ' + strftime_now('%d %B %Y') + '.<|im_end|>\\n' }}\n" + BODY
MINUTE = DAY.replace("%d %B %Y", "%Y-%m-%d %H:%M:%S")
IF_IT_CAN = (
    """\
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}
    {%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}
{%- endif %}
{{- '<|im_start|>system\\nToday Date: ' + date_string + '<|im_end|>\\n' }}
"""
    + BODY
)
WITH_TOOLS_ONLY = "{%- if tools %}{{- strftime_now('%d %B %Y') }}{%- endif %}\n" + BODY
NOTE = "the chat template prints the day or the time"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with environment.silence_libraries():
        return runs.make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def go_to(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Change the time zone: between the two below there are 26 hours, so the day is never the same."""

    def change(zone: str) -> None:
        monkeypatch.setenv("TZ", zone)
        time.tzset()

    yield change
    monkeypatch.undo()
    time.tzset()


FIRST, LATER = "Etc/GMT+12", "Pacific/Kiritimati"


def _edgetune(*arguments: object) -> int:
    return cli.run([str(argument) for argument in arguments])


def _config(base: Path, folder: Path, template: str, **training: Any) -> Path:
    (folder / "dated.jinja").write_text(template)
    values = runs.settings(base, folder, max_steps=2, max_length=128, **training)
    values["data"]["chat_template"] = "dated.jinja"
    return runs.write_config(folder / "config.yaml", values)


@pytest.mark.parametrize("template", [DAY, MINUTE, IF_IT_CAN, WITH_TOOLS_ONLY])
def test_files_pass_and_a_run_is_finished_on_a_later_day(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], go_to: Any, template: str
) -> None:
    config, run = _config(base, tmp_path, template), tmp_path / "run"
    go_to(FIRST)
    assert _edgetune("train", config, "-o", run) == 0
    assert capfd.readouterr().err.count(NOTE) == 1
    export = ("merge-export", run, "--format", "gguf,onnx", "-q", "f32")
    assert _edgetune(*export) == 0
    go_to(LATER)
    assert _edgetune(*export, "-o", tmp_path / "later") == 0
    for name in ("run-f32.gguf", "run-f32-onnx/model.onnx"):
        assert sha256_of(tmp_path / "later" / name) == sha256_of(run / "artifacts" / name)
    for name in ("run-f32.gguf", "run-f32-onnx"):
        assert _edgetune("verify", run / "artifacts" / name) == 0
        assert _edgetune("validate", run, run / "artifacts" / name) == 0
    capfd.readouterr()
    trained = sha256_of(run / "adapter/adapter_model.safetensors")
    for flags in (["--resume"], ["--resume", "--overwrite"]):
        assert _edgetune("train", config, "-o", run, *flags) == 0
        assert "there is nothing to resume" in capfd.readouterr().err
    assert _edgetune("reference", run, "--count", "2") == 0
    assert _edgetune("verify", run / "artifacts/run-f32.gguf") == 0
    assert sha256_of(run / "adapter/adapter_model.safetensors") == trained


def test_the_stored_day_reaches_prompts_answers_and_tasks_and_run_keeps_the_real_clock(
    base: Path, tmp_path: Path, go_to: Any
) -> None:
    config, run = _config(base, tmp_path, DAY), tmp_path / "run"
    go_to(FIRST)
    first = datetime.now().strftime("%d %B %Y")
    assert _edgetune("train", config, "-o", run) == 0
    assert _edgetune("merge-export", run, "-q", "f32") == 0
    go_to(LATER)
    later = datetime.now().strftime("%d %B %Y")
    stored = json.loads((run / "reference/reference.json").read_text())
    assert all(f"Today is {first}." in entry["text"] for entry in stored["contract"])
    moments = {entry["rendered_at"] for entry in (*stored["contract"], *stored["task"]["rows"])}
    assert len(moments) == 1
    with runtime.load(run / "artifacts/run-f32.gguf") as model:
        assert all(first in _text(model, answer["prompt"]) for answer in stored["greedy"])
        assert later in _text(model, model.tokenize_chat([{"role": "user", "content": "lamp?"}]))
    assert _edgetune("validate", run, run / "artifacts/run-f32.gguf") == 0
    results = json.loads(next((run / "artifacts").glob("*validation.json")).read_text())
    task = next(rung["task"] for rung in results["rungs"] if rung.get("task") and "same_as_trained" in rung["task"])
    assert task["same_as_trained"] == task["rows"]


def _text(model: runtime.Runtime, ids: list[int]) -> str:
    return b"".join(model.token_bytes(id_, special=True) for id_ in ids).decode()


def test_a_training_that_was_killed_goes_on_after_midnight(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], go_to: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = _config(base, tmp_path, DAY), tmp_path / "run"
    go_to(FIRST)
    with monkeypatch.context() as patched:
        patched.setattr("edgetune.training.fit._train", _stop)
        assert _edgetune("train", config, "-o", run) != 0
    first = RunDirectory(run).manifest.rendered_at
    assert first is not None
    go_to(LATER)
    capfd.readouterr()
    assert _edgetune("train", config, "-o", run, "--resume", "--dry-run") == 0
    assert _edgetune("train", config, "-o", run, "--resume") == 0
    found = json.loads((run / "run.json").read_text())["data"]
    assert found["rendered_at"] == first
    assert found["rendered_at"][:10] != datetime.now().isoformat()[:10]
    (tmp_path / "train.jsonl").write_text((tmp_path / "train.jsonl").read_text() * 2)
    assert _edgetune("train", config, "-o", run, "--resume", "--overwrite") == 0
    again = json.loads((run / "run.json").read_text())["data"]["rendered_at"]
    assert again[:10] == datetime.now().isoformat()[:10]  # a training from the start has its own day


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_preview_says_that_the_template_prints_the_day(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _edgetune("preview", _config(base, tmp_path, DAY)) == 0
    assert capfd.readouterr().out.count(NOTE) == 1


def test_a_template_without_the_day_stores_none(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert _edgetune("train", _config(base, tmp_path, BODY), "-o", run) == 0
    assert NOTE not in capfd.readouterr().err
    assert "rendered_at" not in (run / "run.json").read_text() + (run / "reference/reference.json").read_text()
