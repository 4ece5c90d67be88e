"""`edgetune validate`: the table, the JSON beside the file, and the gate's exit code."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.cli_runner import edgetune, sentence
from tests.runtime import models


@pytest.fixture
def copy(file: Path, tmp_path: Path) -> Path:
    """The file in a folder of its own, where its report appears."""
    return Path(shutil.copy(file, tmp_path / "tiny.gguf"))


def report_of(file: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(file.with_name(file.name + ".validation.json").read_text(encoding="utf-8"))
    return found


def test_the_table_and_the_report(run_directory: Path, copy: Path) -> None:
    result = edgetune("validate", run_directory, copy, "--gate", "mean_kld_max=1e-6", "--gate", "recovery_min=0.999")
    assert result.returncode == 0, result.stderr
    table = result.stdout.decode()
    assert max(map(len, table.splitlines())) <= 100
    for word in (
        "base", "trained", "tiny", "recovery", "1.0000", "100.0%", "contract holds", "coding floor", "a small sample"
    ):  # fmt: skip
        assert word in table
    assert result.stderr == b""
    report = report_of(copy)
    assert report["passed"] is True
    rungs = report["rungs"]
    assert isinstance(rungs, list)
    assert [rung["name"] for rung in rungs] == ["base", "trained", "tiny.gguf"]
    assert rungs[2]["figures"]["recovery"] == pytest.approx(1)
    assert rungs[2]["contract"]["holds"] is True
    assert rungs[2]["task"]["same_as_trained"] == rungs[2]["task"]["rows"]
    assert {path.name for path in copy.parent.iterdir()} == {copy.name, copy.name + ".validation.json"}
    assert str(copy.parent) not in json.dumps(report)


def test_a_closed_gate_exits_with_3_and_still_reports(run_directory: Path, copy: Path, base: Path) -> None:
    coarse = models.gguf(base, copy.with_name("q4.gguf"), "q4_0")
    result = edgetune("validate", run_directory, copy, coarse, "--no-task", "--gate", "mean_kld_max=0.01")
    assert result.returncode == 3
    said = " ".join(result.stderr.decode().split())
    assert "q4.gguf: mean KLD is 0." in said
    assert "above the limit of 0.01" in said
    assert "lost at: quantize" in said
    assert b"q4" in result.stdout
    assert report_of(copy)["passed"] is True
    assert report_of(coarse)["passed"] is False


def test_a_broken_contract_closes_the_gate_without_any_threshold(run_directory: Path, copy: Path) -> None:
    copy.write_bytes(copy.read_bytes().replace(b"tokenizer.chat_template", b"tokenizer.chat_templote"))
    result = edgetune("validate", run_directory, copy)
    assert result.returncode == 3
    assert b"no chat template" in result.stderr
    assert b"contract broken: template" in result.stdout


def test_the_thresholds_of_the_configuration_hold_unless_given(run_directory: Path, copy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_directory, run)
    manifest = json.loads((run / "run.json").read_text())
    manifest["config"]["gate"]["recovery_min"] = 1.5
    (run / "run.json").write_text(json.dumps(manifest))
    assert edgetune("validate", run, copy, "--no-task").returncode == 3
    assert edgetune("validate", run, copy, "--no-task", "--gate", "recovery_min=").returncode == 0


def test_one_report_where_asked_beside_that_of_the_file(run_directory: Path, copy: Path, tmp_path: Path) -> None:
    place = tmp_path / "reports/all.json"
    result = edgetune("validate", run_directory, copy, "--json", place, "--rows", "2", "--no-task", "--threads", "2")
    assert result.returncode == 0, result.stderr
    assert json.loads(place.read_text())["reference"]["rows"] == 2
    assert copy.with_name(copy.name + ".validation.json").is_file()
    page = tmp_path / "page.html"
    assert edgetune("report", run_directory, copy, "-o", page).returncode == 0
    assert page.is_file()


def test_junit_has_a_case_for_each_check_and_skips_what_was_not_measured(
    run_directory: Path, copy: Path, tmp_path: Path
) -> None:
    place = tmp_path / "deep/junit.xml"
    gates = ("--gate", "mean_kld_max=1e-6", "--gate", "task_drop_max=0", "--gate", "same_top_min=1")
    result = edgetune("validate", run_directory, copy, "--no-task", *gates, "--junit", place)
    assert result.returncode == 0
    said = " ".join(result.stderr.decode().split())
    assert "warning: tiny.gguf: task_drop_max is set and was not measured: the test rows were not answered" in said
    suite = ElementTree.parse(place).getroot()[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("5", "0", "1")
    cases = {case.get("name"): [child.tag for child in case] for case in suite}
    assert cases == {"origin": [], "contract": [], "mean_kld_max": [], "same_top_min": [], "task_drop_max": ["skipped"]}
    report = report_of(copy)
    assert report["passed"] is None
    assert report["unmeasured"] == [
        {"rung": "tiny.gguf", "figure": "task_drop_max",
         "reason": "the test rows were not answered (--no-task, or the run has none)"}
    ]  # fmt: skip


def test_bad_files_are_one_sentence_and_leave_no_report(run_directory: Path, bad: Path) -> None:
    result = edgetune("validate", run_directory, bad)
    assert result.returncode == 1
    assert "bad.gguf" in sentence(result).replace("\n", "")
    assert not list(bad.parent.glob("*.json"))


def write_adapter(path: Path) -> Path:
    """What makes a GGUF file an adapter."""
    header = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
    key, value = b"general.type", b"adapter"
    text = struct.pack(f"<Q{len(key)}sIQ{len(value)}s", len(key), key, 8, len(value), value)
    path.write_bytes(header + text + bytes(-len(header + text) % 32))
    return path


@pytest.mark.parametrize("name", ["a-lora.gguf", "merged", "artifacts", "run"])
def test_what_is_no_model_is_said_to_be_what_it_is(file: Path, tmp_path: Path, name: str) -> None:
    """By `run` as by all others, with what could be meant."""
    folder = tmp_path / "run/artifacts"
    folder.mkdir(parents=True)
    (folder / "merged").mkdir()
    (folder / "merged/model.safetensors").write_bytes(b"")
    write_adapter(folder / "a-lora.gguf")
    shutil.copy(file, folder / "tiny.gguf")
    path = {"run": tmp_path / "run", "artifacts": folder}.get(name, folder / name)
    said = " ".join(sentence(edgetune("run", path, "-p", "x")).split())
    words = {"a-lora.gguf": "is an adapter, which runs only", "merged": "is a model directory for transformers"}
    assert words.get(name, f"for instance {folder / 'tiny.gguf'}") in said


def test_what_lies_beside_artifacts_is_skipped_and_said(run_directory: Path, file: Path, tmp_path: Path) -> None:
    """What a shell makes of `artifacts/*` after an export with everything and a validation."""
    copy = Path(shutil.copy(file, tmp_path / "tiny.gguf"))
    for name in ("tiny.gguf.receipt.json", "tiny.gguf.validation.json", "tiny.Modelfile", "README.md", "notes.txt"):
        (tmp_path / name).write_text("{}")
    write_adapter(tmp_path / "tiny-lora.gguf")
    (tmp_path / "tiny-merged").mkdir()
    (tmp_path / "tiny-merged/model.safetensors").write_bytes(b"")
    result = edgetune("validate", run_directory, *sorted(tmp_path.iterdir()), "--no-task")
    assert result.returncode == 0, result.stderr
    said = result.stderr.decode()
    assert said.count("\n") == 1
    for words in (
        "receipts (tiny.gguf.receipt.json)", "reports (tiny.gguf.validation.json)", "Modelfiles (tiny.Modelfile)",
        "model cards (README.md)", "adapters (tiny-lora.gguf)", "merged safetensors directories (tiny-merged)",
        "other files (notes.txt)",
    ):  # fmt: skip
        assert words in said
    assert [rung["name"] for rung in report_of(copy)["rungs"]] == ["base", "trained", "tiny.gguf"]  # type: ignore[attr-defined]


def test_what_may_be_a_damaged_model_is_not_skipped(run_directory: Path, file: Path, bad: Path) -> None:
    result = edgetune("validate", run_directory, file, bad, "--no-task")
    assert result.returncode == 1
    assert "bad.gguf" in sentence(result).replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (["{run}", "{file}", "{file}"], 2, "two files are called"),
        (["{run}", "{file}", "--gate", "mean_kld=1"], 2, "did you mean gate.mean_kld_max"),
        (["{file}", "{file}"], 1, "not a run directory"),
        (["{run}"], 2, "FILE..."),
        (["{run}", "{run}"], 1, "is a directory"),
    ],
)
def test_arguments_that_make_no_sense(
    run_directory: Path, file: Path, arguments: list[str], code: int, what: str
) -> None:
    result = edgetune("validate", *(text.format(run=run_directory, file=file) for text in arguments))
    assert result.returncode == code
    assert what in sentence(result).replace("\n", " ")


def test_a_damaged_reference_is_one_sentence(run_directory: Path, copy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_directory, run)
    codes = run / "reference/trained.codes.npy"
    codes.write_bytes(codes.read_bytes()[:-100])
    result = edgetune("validate", run, copy)
    assert result.returncode == 1
    assert "is damaged" in sentence(result).replace("\n", " ")
