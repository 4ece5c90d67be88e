"""Bad input to the main line: one clear sentence with the value, what to do, exit code 1 or 2, nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgetune import cli

SAMPLE = Path(__file__).parents[2] / "samples/smart-home"
ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}


@dataclass
class Project:
    """A folder with a base, data and a configuration that would work."""

    path: Path

    @property
    def base(self) -> Path:
        return self.path / "base"

    @property
    def data(self) -> Path:
        return self.path / "train.jsonl"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def output(self) -> Path:
        return self.path / "out"

    def change_config_json(self, **entries: object) -> None:
        file = self.base / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project(tmp_path)
    shutil.copytree(SAMPLE / "base", project.base)
    project.data.write_text("".join(json.dumps(ROW) + "\n" for _ in range(20)))
    project.config.write_text("base: base\ndata: {train: train.jsonl}\n")
    return project


def remove_base(project: Project) -> None:
    shutil.rmtree(project.base)


def empty_base(project: Project) -> None:
    shutil.rmtree(project.base)
    project.base.mkdir()


def pickle_base(project: Project) -> None:
    (project.base / "model.safetensors").rename(project.base / "pytorch_model.bin")


def truncated_base(project: Project) -> None:
    file = project.base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def unknown_architecture(project: Project) -> None:
    project.change_config_json(architectures=["RwkvForCausalLM"], model_type="rwkv")


def no_json_line(project: Project) -> None:
    lines = project.data.read_text().splitlines()
    project.data.write_text("\n".join([*lines[:2], "{not json", *lines[3:]]))


def unknown_row(project: Project) -> None:
    project.data.write_text('{"frage": "a", "antwort": "b"}\n')


def empty_data(project: Project) -> None:
    project.data.write_text("")


def missing_data(project: Project) -> None:
    project.data.unlink()


def misspelt_key(project: Project) -> None:
    project.config.write_text("base: base\ndata: {train: train.jsonl}\ntraining: {epoch: 3}\n")


def unknown_optimizer(project: Project) -> None:
    project.config.write_text("base: base\ndata: {train: train.jsonl}\ntraining: {optimizer: adam}\n")


Damage = Callable[[Project], None]
TRAIN: list[tuple[Damage, int, tuple[str, ...]]] = [
    (remove_base, 1, ("base",)),
    (empty_base, 1, ("base", "empty")),
    (pickle_base, 1, ("pytorch_model.bin", "safetensors")),
    (truncated_base, 1, ("model.safetensors", "truncated")),
    (unknown_architecture, 1, ("RwkvForCausalLM", "Llama", "Qwen2")),
    (no_json_line, 1, ("train.jsonl", "line 3")),
    (unknown_row, 1, ("train.jsonl", "frage", "messages")),
    (empty_data, 1, ("train.jsonl",)),
    (missing_data, 1, ("train.jsonl",)),
    (misspelt_key, 2, ("training.epoch", "did you mean training.epochs?")),
    (unknown_optimizer, 2, ("adam", "paged_adamw_8bit")),
]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """Standard error without the line breaks of a narrow terminal."""
    captured = capsys.readouterr()
    assert captured.out == ""
    return " ".join(captured.err.split())


@pytest.mark.parametrize(("damage", "code", "words"), TRAIN, ids=lambda value: getattr(value, "__name__", None))
def test_bad_input_of_train_is_one_sentence_and_leaves_nothing(
    project: Project, capsys: pytest.CaptureFixture[str], damage: Damage, code: int, words: tuple[str, ...]
) -> None:
    damage(project)
    assert cli.run(["train", str(project.config), "-o", str(project.output)]) == code
    message = said(capsys)
    assert "error:" in message
    for word in words:
        assert word in message
    assert not project.output.exists()


EXPORT: list[tuple[Damage, tuple[str, ...]]] = [
    (remove_base, ("base",)),
    (empty_base, ("base", "empty")),
    (pickle_base, ("pytorch_model.bin", "safetensors")),
    (truncated_base, ("model.safetensors", "truncated")),
    (unknown_architecture, ("RwkvForCausalLM", "Llama", "Qwen2")),
]


@pytest.mark.parametrize(("damage", "words"), EXPORT, ids=lambda value: getattr(value, "__name__", None))
def test_bad_input_of_merge_export_is_one_sentence_and_leaves_nothing(
    project: Project, capsys: pytest.CaptureFixture[str], damage: Damage, words: tuple[str, ...]
) -> None:
    damage(project)
    output = project.output / "x.gguf"
    assert cli.run(["merge-export", "--base", str(project.base), "-q", "q8_0", "-o", str(output)]) == 1
    message = said(capsys)
    for word in words:
        assert word in message
    assert not output.exists()
    assert not project.output.exists() or not list(project.output.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, ("nothing to export was named",)),
        (["no-such-run"], 1, ("there is no run in no-such-run",)),
        (["--base", str(SAMPLE / "base"), "-q", "q9_x"], 2, ("q9_x", "q4_k_m")),
        (["--base", str(SAMPLE / "base"), "-q", ","], 2, ("-q names no type",)),
        (["--base", str(SAMPLE / "base"), "-q", "q8_0,f16", "-o", "x.gguf"], 2, ("one file", "folder")),
        (["--base", str(SAMPLE / "base"), "--adapter", "no-such-adapter"], 1, ("no-such-adapter",)),
    ],
)
def test_merge_export_arguments(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    words: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["merge-export", *arguments]) == code
    message = said(capsys)
    for word in words:
        assert word in message
    assert list(tmp_path.iterdir()) == []
