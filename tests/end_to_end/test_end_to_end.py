"""The whole line as a user walks it: train, merge-export, run, validate, inspect; then with torch out of reach."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgetune_converters.gguf import reader
from tests.end_to_end.cli_runner import edgetune, edgetune_process, short_run

PROMPT = "turn on the kitchen light"


def test_the_run_directory_has_what_the_map_says(run_directory: Path) -> None:
    manifest = json.loads((run_directory / "run.json").read_text(encoding="utf-8"))
    assert manifest["base"]["files"].keys() >= {"model.safetensors", "config.json"}
    assert manifest["config"]["name"] == "smart-home"
    assert "train" in manifest["stages"]
    for name in ("adapter/adapter_model.safetensors", "tokenizer/tokenizer.json", "tokenizer/chat_template.jinja"):
        assert (run_directory / name).is_file()
    metrics = [json.loads(line) for line in (run_directory / "logs/metrics.jsonl").read_text().splitlines()]
    assert any("loss" in row for row in metrics)
    assert not (run_directory / "run.unfinished.json").exists()


def test_torch_is_really_out_of_reach(without_torch: dict[str, str]) -> None:
    result = subprocess.run([sys.executable, "-c", "import torch"], env=without_torch, capture_output=True, text=True)
    assert "not to be imported here" in result.stderr


def test_export_run_validate_inspect_without_torch(
    run_directory: Path, without_torch: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "m.gguf"
    exported = edgetune_process("merge-export", run_directory, "-q", "q4_k_m", "-o", file, **without_torch)
    assert exported.returncode == 0, exported.stderr
    commands: list[list[str | Path]] = [
        ["run", file, "-p", PROMPT, "--max-tokens", "8"],
        ["inspect", file],
        ["inspect", run_directory],
    ]
    for arguments in commands:
        result = edgetune_process(*arguments, **without_torch)
        assert result.returncode == 0, result.stderr
        assert result.stdout
    report = tmp_path / "report.json"
    # six steps do not train a model: what is asked here is that everything is measured and the contract holds
    validated = edgetune_process(
        "validate", run_directory, file, "--json", report, "--gate", "recovery_min=-1000", "--gate", "same_top_min=0",
        "--gate", "task_drop_max=1", **without_torch,
    )  # fmt: skip
    assert validated.returncode == 0, validated.stderr
    assert json.loads(report.read_text(encoding="utf-8"))


def test_several_types_come_from_one_read_with_receipts(artifact: Path) -> None:
    for type_ in ("q4_k_m", "q8_0"):
        file = artifact.with_name(f"smart-home-{type_}.gguf")
        receipt = json.loads(file.with_name(file.name + ".receipt.json").read_text(encoding="utf-8"))
        assert receipt["recipe"] == type_
        assert receipt["size"] == file.stat().st_size
        assert reader.read(file).metadata["general.architecture"] == "llama"
    assert {path.suffix for path in artifact.parent.iterdir()} == {".gguf", ".json", ".ngrams"}


def test_the_artifact_carries_the_template_of_training(run_directory: Path, artifact: Path) -> None:
    template = (run_directory / "tokenizer/chat_template.jinja").read_text(encoding="utf-8")
    assert reader.read(artifact).metadata["tokenizer.chat_template"] == template


def test_run_prints_the_answer_and_nothing_else(artifact: Path) -> None:
    first = edgetune("run", artifact, "-p", PROMPT, "--max-tokens", "8")
    second = edgetune("run", artifact, "-p", PROMPT, "--max-tokens", "8")
    assert first.returncode == 0
    assert first.stdout == second.stdout  # greedy by default
    assert first.stderr == ""


def test_a_gate_that_is_missed_exits_with_3_and_names_the_figure(run_directory: Path, artifact: Path) -> None:
    result = edgetune("validate", run_directory, artifact, "--no-task", "--gate", "mean_kld_max=0")
    assert result.returncode == 3
    assert "KLD" in result.stderr


def test_another_base_is_refused(run_directory: Path, tmp_path: Path) -> None:
    manifest = json.loads((run_directory / "run.json").read_text(encoding="utf-8"))
    base = tmp_path / "other"
    base.mkdir()
    for file in Path(manifest["base"]["path"]).iterdir():
        content = file.read_bytes()
        (base / file.name).write_bytes(
            content[:-1] + bytes([content[-1] ^ 1]) if file.suffix == ".safetensors" else content
        )
    result = edgetune("merge-export", run_directory, "--base", base, "-o", tmp_path / "x.gguf")
    assert result.returncode == 1
    assert "not the base" in result.stderr
    assert not (tmp_path / "x.gguf").exists()


def test_an_adapter_with_a_flipped_bit_is_refused(run_directory: Path, artifact: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "run"
    shutil.copytree(run_directory, damaged, ignore=shutil.ignore_patterns("artifacts", "checkpoints"))
    weights = damaged / "adapter/adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1000] ^= 1
    weights.write_bytes(content)
    result = edgetune("merge-export", damaged, "-q", "q8_0,q4_k_m", "-o", tmp_path / "out")
    assert result.returncode == 1
    assert "is not the adapter that was trained: adapter_model.safetensors differs" in result.stderr
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    checked = edgetune("validate", damaged, artifact, "--no-task")
    assert checked.returncode == 3
    assert "the run's adapter is not the one that was trained" in checked.stderr
    assert "not made with this run's adapter" not in checked.stderr  # it was, before that

    manifest = json.loads((damaged / "run.json").read_text(encoding="utf-8"))
    del manifest["stages"]["train"]["adapter"]  # as older versions wrote it
    (damaged / "run.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert edgetune("merge-export", damaged, "-q", "q8_0", "-o", tmp_path / "old.gguf").returncode == 0


def test_an_existing_file_is_not_overwritten_by_accident(run_directory: Path, artifact: Path) -> None:
    before = artifact.read_bytes()
    result = edgetune("merge-export", run_directory, "-q", "q4_k_m")
    assert result.returncode == 2
    assert "--overwrite" in result.stderr
    assert edgetune("merge-export", run_directory, "-q", "q4_k_m", "--overwrite").returncode == 0
    assert artifact.read_bytes() == before  # the same input gives the same bytes


def test_a_disk_that_fills_up_leaves_nothing(run_directory: Path, tmp_path: Path) -> None:
    """A file size limit stands in for a full disk: the write fails in the middle, after the check of free space."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000));"
        "from edgetune.cli import run; sys.exit(run(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "merge-export", str(run_directory), "-o", str(tmp_path / "x.gguf")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "error:" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing"])
@pytest.mark.parametrize("verb", ["run", "inspect", "validate"])
def test_a_damaged_file_is_one_sentence(
    verb: str, damage: str, run_directory: Path, artifact: Path, tmp_path: Path
) -> None:
    file = tmp_path / "bad.gguf"
    if damage != "missing":
        file.write_bytes(artifact.read_bytes()[:100_000] if damage == "truncated" else b"PK\x03\x04" + bytes(1000))
    arguments: dict[str, list[str | Path]] = {
        "run": ["run", file, "-p", "x"],
        "inspect": ["inspect", file],
        "validate": ["validate", run_directory, file],
    }
    result = edgetune(*arguments[verb])
    assert result.returncode in (1, 2)
    assert "bad.gguf" in result.stderr.replace("\n", "")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_stopping_training_leaves_an_unfinished_run_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run"
    arguments = [*short_run(path), "--set", "training.max_steps=400", "--set", "training.epochs=100"]
    process = subprocess.Popen(
        [sys.executable, "-m", "edgetune.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = path / "logs/metrics.jsonl"
    deadline = time.monotonic() + 180
    while not (list(path.glob("checkpoints/checkpoint-*/trainer_state.json")) and metrics.exists()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    before = metrics.read_text(encoding="utf-8")
    for again in ([*arguments, "--resume"], [*arguments, "--overwrite"], ["merge-export", path, "-o", path / "x.gguf"]):
        second = edgetune(*again)
        assert second.returncode == 1
        assert f"a training (pid {process.pid}) is writing in {path}" in " ".join(second.stderr.split())
    assert process.poll() is None
    assert metrics.read_text(encoding="utf-8").startswith(before)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not (path / "run.json").exists()
    refused = edgetune("merge-export", path, "-o", tmp_path / "x.gguf")
    assert refused.returncode == 1
    assert "--resume" in refused.stderr
