"""The pipeline in make: real rules run by the real make, with a stand-in for edgetune that only writes its outputs.

What edgetune itself writes is tested elsewhere; here it is make's decisions: what is made again, what is left alone and
what is removed after a failure.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from edgetune.commands.make_rules import argument, file_name, make_rules
from edgetune.config import load_config

STAND_IN = """#!/bin/sh
echo "$*" >> calls
case $1 in
  train) mkdir -p "$4"; echo '{}' > "$4/run.json" ;;
  merge-export) mkdir -p "$8"; for t in q4_k_m q8_0; do echo gguf > "$8/demo-$t.gguf"; done ;;
  validate) echo '{}' > "$5"; test ! -e gate-fails ;;
esac
"""
CONFIG = "name: demo\nbase: base\ndata: {train: my data.jsonl}\nexport: {types: [q4_k_m, q8_0]}\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a configuration, data with a blank in its name, a base, and a Makefile as the README shows it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    (tmp_path / "base/model.safetensors").write_text("")
    (tmp_path / "my data.jsonl").write_text("{}\n")
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "edgetune").write_text(STAND_IN)
    (tmp_path / "edgetune").chmod(0o755)
    path = Path("config.yaml")
    (tmp_path / "Makefile").write_text(make_rules(path, load_config(path)))
    return tmp_path


def make(project: Path) -> tuple[int, list[str]]:
    """Run make; its exit code and the verbs of edgetune that it called."""
    calls = project / "calls"
    calls.unlink(missing_ok=True)
    environment = {**os.environ, "EDGETUNE": "./edgetune", "MAKEFLAGS": ""}
    result = subprocess.run(["make", "pipeline"], cwd=project, env=environment, capture_output=True, text=True)
    return result.returncode, [line.split()[0] for line in calls.read_text().splitlines()] if calls.exists() else []


def touch_later(path: Path) -> None:
    """Make `path` newer than everything made so far, whatever the clock's grain."""
    later = time.time() + 5
    os.utime(path, (later, later))


ALL = ["train", "merge-export", "validate", "validate"]


def test_everything_is_made_once(project: Path) -> None:
    assert make(project) == (0, ALL)
    assert make(project) == (0, [])


@pytest.mark.parametrize(
    ("touched", "verbs"),
    [
        ("my data.jsonl", ALL),
        ("config.yaml", ALL),
        ("base/model.safetensors", ALL),
        ("runs/demo/run.json", ALL[1:]),
        ("runs/demo/artifacts/demo-q8_0.gguf", ["validate"]),
    ],
)
def test_touching_makes_what_depends_on_it(project: Path, touched: str, verbs: list[str]) -> None:
    assert make(project)[0] == 0
    touch_later(project / touched)
    assert make(project) == (0, verbs)


def test_a_failed_gate_leaves_no_report(project: Path) -> None:
    (project / "gate-fails").touch()
    code, _ = make(project)
    assert code != 0
    assert not list(project.rglob("*.validation.json"))
    (project / "gate-fails").unlink()
    assert make(project) == (0, ["validate", "validate"])


@pytest.mark.parametrize("name", ["a b.txt", "50%.txt", "a#b", "c:d", "$x", "it's"])
def test_names_survive_make_and_the_shell(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    (tmp_path / "Makefile").write_text(f"out: {file_name(Path(name))}\n\tcp {argument(Path(name))} out\n")
    subprocess.run(["make"], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "out").exists()
