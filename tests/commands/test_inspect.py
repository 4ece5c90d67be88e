"""`edgetune inspect`: what is in a file or a run."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from tests.cli_runner import edgetune, sentence
from tests.runtime import models


def test_facts_of_a_file_are_printed_as_text(file: Path) -> None:
    result = edgetune("inspect", file)
    assert result.returncode == 0
    text = result.stdout.decode()
    for word in ("qwen2", "bits per weight", "32", "token_embd.weight", "<|im_end|>", "edgetune.base.sha256", "f32"):
        assert word in text
    assert "ffn_down" in text


def test_facts_of_a_file_are_printed_as_json(file: Path) -> None:
    facts = json.loads(edgetune("inspect", file, "--json", "--tensors").stdout)
    assert facts["file"]["bytes"] == file.stat().st_size
    assert facts["file"]["bits per weight"] == 32
    assert facts["file"]["parameters"] * 4 == sum(tensor["bytes"] for tensor in facts["tensors"].values())
    assert facts["model"]["context_length"] == 256
    assert facts["types"] == {
        "f32": {"tensors": facts["file"]["tensors"], "bytes": facts["file"]["parameters"] * 4, "share": 1.0}
    }
    assert facts["tokenizer"]["eos"] == "501 '<|im_end|>'"
    assert facts["tokenizer"]["chat template sha256"] == hashlib.sha256(models.TEMPLATE.encode()).hexdigest()
    assert facts["receipt"]["recipe"] == "f32"


def test_every_tensor_is_listed_when_asked(file: Path) -> None:
    short, long = (edgetune("inspect", file, *options).stdout.decode() for options in ([], ["--tensors"]))
    assert "blk.2.ffn_norm.weight" not in short
    assert "blk.2.ffn_norm.weight" in long


def test_a_run_with_its_artifacts(run_directory: Path, file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_directory, run)
    (run / "artifacts").mkdir()
    copy = Path(shutil.copy(file, run / "artifacts/tiny.gguf"))
    assert edgetune("validate", run, copy, "--no-task").returncode == 0
    facts = json.loads(edgetune("inspect", run, "--json").stdout)
    assert facts["artifacts"]["tiny.gguf"]["passed"] is True
    assert facts["adapter"]["r"] == 16
    text = edgetune("inspect", run).stdout.decode()
    for word in ("base", "adapter", "quantization", "tiny.gguf", "recovery 1"):
        assert word in text
    assert json.loads(edgetune("inspect", copy, "--json").stdout)["validation"]["passed"] is True


def test_an_unfinished_run_is_shown_with_its_status(run_directory: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run_directory, tmp_path / "run")
    (run / "run.json").rename(run / "run.unfinished.json")
    facts = json.loads(edgetune("inspect", run, "--json").stdout)
    assert facts["run"]["status"] == "unfinished: complete it with edgetune train --resume"
    assert facts["adapter"]["r"] == 16
    assert "status" not in json.loads(edgetune("inspect", run_directory, "--json").stdout)["run"]


def test_bad_files_are_one_sentence(bad: Path) -> None:
    result = edgetune("inspect", bad)
    assert result.returncode == 1
    assert "bad.gguf" in sentence(result)


def test_a_directory_that_is_no_run(tmp_path: Path) -> None:
    result = edgetune("inspect", tmp_path)
    assert result.returncode == 1
    assert "there is no run in" in sentence(result)
    (tmp_path / "thesis.txt").touch()
    assert "is not a run directory" in sentence(edgetune("inspect", tmp_path))
    (tmp_path / "model.safetensors").touch()
    assert "is a model directory for transformers" in sentence(edgetune("inspect", tmp_path))


def test_a_malformed_receipt_is_an_error(file: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(file, tmp_path / "tiny.gguf"))
    (tmp_path / "tiny.gguf.receipt.json").write_text("{}")
    result = edgetune("inspect", copy)
    assert result.returncode == 1
    assert "is not a receipt" in sentence(result)
