"""The pipeline in make: real rules run by the real make, with a stand-in for edgetune that only writes its outputs.

What edgetune itself writes is tested elsewhere; here it is make's decisions: what is made again, what is left alone and
what is removed after a failure.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgetune.config import load_config
from edgetune.errors import ConfigError
from edgetune.exporting.make_rules import argument, file_name, make_rules

STAND_IN = """#!/bin/sh
echo "$*" >> calls
test ! -e "$1-refuses" || exit 2
case $1 in
  train) mkdir -p "$4/reference"; echo '{}' > "$4/run.json"; echo '{}' > "$4/reference/reference.json" ;;
  merge-export) mkdir -p "$2/artifacts"; for name in $MAKES; do echo made > "$2/artifacts/$name"; done ;;
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
    (tmp_path / "base/generation_config.json").write_text("{}")
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
    made = os.environ.get("MAKES", "demo-q4_k_m.gguf demo-q8_0.gguf")
    environment = {**os.environ, "EDGETUNE": "./edgetune", "MAKEFLAGS": "", "MAKES": made}
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
        ("base/generation_config.json", ALL),  # the run holds a copy
        ("runs/demo/run.json", ALL[1:]),
        ("runs/demo/reference/reference.json", ALL[2:]),  # as `edgetune reference` does
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


@pytest.mark.parametrize(("verb", "touched"), [("train", "config.yaml"), ("merge-export", "runs/demo/run.json")])
def test_a_refusal_leaves_what_was_made(project: Path, verb: str, touched: str) -> None:
    """A configuration that is wrong is refused before anything is changed; make must not remove what it had made."""
    assert make(project)[0] == 0
    made = sorted(project.rglob("runs/**/*"))
    touch_later(project / touched)
    (project / f"{verb}-refuses").touch()
    code, verbs = make(project)
    assert (code, verbs) == (2, [verb])
    assert sorted(project.rglob("runs/**/*")) == made
    (project / f"{verb}-refuses").unlink()
    assert make(project) == (0, ALL[ALL.index(verb) :])


def _again_with(project: Path, monkeypatch: pytest.MonkeyPatch, export: str, makes: str) -> None:
    """Other settings of the export, and what it will write then."""
    monkeypatch.setenv("MAKES", makes)
    path = Path("config.yaml")
    path.write_text(CONFIG[: CONFIG.index("export")] + f"export: {export}\n")
    (project / "Makefile").write_text(make_rules(path, load_config(path)))


def test_every_format_is_made_and_models_are_validated(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formats = "{formats: [gguf, onnx, safetensors, gguf-lora], types: [q8_0, int4, bf16]}"
    files = ["demo-q8_0.gguf", "demo-bf16.gguf", "demo-int4-onnx.receipt.json", "demo-bf16.receipt.json"]
    _again_with(project, monkeypatch, formats, " ".join([*files, "demo-lora-bf16.gguf"]))
    assert make(project) == (0, ["train", "merge-export", "validate", "validate", "validate"])
    assert make(project) == (0, [])
    reports = sorted(path.name for path in project.rglob("*.validation.json"))
    assert reports == [f"demo-{name}.validation.json" for name in ("bf16.gguf", "int4-onnx", "q8_0.gguf")]
    (project / "runs/demo/artifacts/demo-lora-bf16.gguf").unlink()
    assert make(project) == (0, ["merge-export", "validate", "validate", "validate"])


def test_an_export_that_is_measured_on_the_reference_depends_on_it(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = "{formats: [onnx], types: [int4], search_types: true}"
    _again_with(project, monkeypatch, settings, "demo-int4-onnx.receipt.json")
    assert make(project) == (0, ["train", "merge-export", "validate"])
    touch_later(project / "runs/demo/reference/reference.json")
    assert make(project) == (0, ["merge-export", "validate"])


def test_a_model_in_parts_is_validated_through_the_first(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = " ".join(f"demo-q8_0-0000{number}-of-00003.gguf" for number in (1, 2, 3))
    _again_with(project, monkeypatch, "{types: [q8_0], split_max_size: 1M}", many)
    assert make(project) == (0, ["train", "merge-export", "validate"])
    folder = "runs/demo/artifacts/demo-q8_0"
    monkeypatch.setenv("MAKES", many.replace("00003.gguf", "00002.gguf").rsplit(" ", 1)[0])
    touch_later(project / "runs/demo/run.json")
    environment = {**os.environ, "EDGETUNE": "./edgetune", "MAKEFLAGS": ""}
    subprocess.run(["make", "pipeline"], cwd=project, env=environment, check=True, capture_output=True)
    last = (project / "calls").read_text().splitlines()[-1]
    assert last == f"validate runs/demo {folder}-00001-of-00002.gguf --json {folder}.gguf.validation.json"
    assert sorted(path.name for path in (project / folder).parent.glob("*-of-*")) == [
        "demo-q8_0-00001-of-00002.gguf",
        "demo-q8_0-00002-of-00002.gguf",
    ]


def test_what_fits_into_one_part_is_not_cut(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _again_with(project, monkeypatch, "{types: [q8_0], split_max_size: 9G}", "demo-q8_0.gguf")
    assert make(project) == (0, ["train", "merge-export", "validate"])
    assert "validate runs/demo runs/demo/artifacts/demo-q8_0.gguf --json" in (project / "calls").read_text()


def test_types_that_no_format_has_are_told_before_training(project: Path) -> None:
    path = Path("config.yaml")
    path.write_text(CONFIG.replace("{types", "{formats: [safetensors], types"))
    with pytest.raises(ConfigError, match="q4_k_m is a type of gguf, not of safetensors"):
        make_rules(path, load_config(path))
    path.write_text(CONFIG.replace("q4_k_m", "int4"))
    with pytest.raises(ConfigError, match="int4 is a type of onnx, not of gguf") as caught:
        make_rules(path, load_config(path))
    assert "Add onnx to the formats" in str(caught.value.hint)


def test_formats_without_types_have_their_own(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _again_with(project, monkeypatch, "{formats: [onnx]}", "demo-int4-onnx.receipt.json")
    assert make(project) == (0, ["train", "merge-export", "validate"])
    assert "merge-export runs/demo --format onnx --overwrite" in (project / "calls").read_text()


ROOT = Path(__file__).parents[2]


def _shown(page: str, language: str) -> str:
    """The first example in a language on a page of the documentation."""
    return (ROOT / page).read_text(encoding="utf-8").split(f"```{language}\n")[1].split("```")[0]


@pytest.mark.parametrize("page", ["README.md", "docs/pipelines.md"])
def test_the_makefile_that_is_shown_fits_the_configuration_that_is_shown(project: Path, page: str) -> None:
    path = project / "config.yaml"
    path.write_text("base: [\n")
    (project / "Makefile").write_text(_shown(page, "make"))
    command = ["make", "release", f"EDGETUNE={sys.executable} -m edgetune"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "error:" in refused.stderr
    assert not Path(".edgetune.mk").exists()  # an empty one would be the rules of the next call
    path.write_text(_shown("README.md", "yaml"))
    planned = subprocess.run([*command, "--dry-run"], capture_output=True, text=True)
    assert planned.returncode == 0, planned.stderr
    assert "validate runs/assistant runs/assistant/artifacts/assistant-q8_0.gguf" in planned.stdout


def test_a_configuration_that_does_not_exist_is_one_sentence() -> None:
    result = subprocess.run(["make", "pipeline", "CONFIG=no.yaml"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "there is no configuration file no.yaml; name yours with `make pipeline CONFIG=my.yaml`" in result.stderr


@pytest.mark.parametrize("name", ["a b.txt", "50%.txt", "a#b", "c:d", "$x", "it's"])
def test_names_survive_make_and_the_shell(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    (tmp_path / "Makefile").write_text(f"out: {file_name(Path(name))}\n\tcp {argument(Path(name))} out\n")
    subprocess.run(["make"], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "out").exists()
