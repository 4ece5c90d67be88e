"""`run`, `inspect` and `validate` take an ONNX folder as they take a GGUF file."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from edgetune.runtime import Sampling, load
from tests.cli_runner import COMMAND, edgetune, sentence
from tests.runtime import models

PROMPT = "dim the lights"


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.onnx(base, tmp_path_factory.mktemp("onnx") / "tiny-f32")


@pytest.fixture(scope="module")
def int4(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.onnx(base, tmp_path_factory.mktemp("onnx") / "tiny-int4", "int4")


def test_run_prints_the_same_answer_from_the_folder_and_from_its_graph(folder: Path) -> None:
    with load(folder) as runtime:
        ids = list(runtime.generate(runtime.tokenize(PROMPT), Sampling(), 12))
        expected = (runtime.detokenize(ids) + "\n").encode()
    for path in (folder, folder / "model.onnx"):
        result = edgetune("run", path, "--raw", "-p", PROMPT, "--max-tokens", "12")
        assert result.stdout == expected
        assert result.stderr == b""


def test_run_refuses_a_context_that_the_graph_has_not(folder: Path) -> None:
    result = edgetune("run", folder, "-p", PROMPT, "--context", "512")
    assert result.returncode == 1
    assert "was made for 256" in sentence(result)


def test_run_in_pieces_of_a_prompt_can_be_stopped(base: Path, tmp_path: Path) -> None:
    """Ctrl-C while ONNX Runtime computes ends the command at once, in one line."""
    folder = models.onnx(models.base(tmp_path / "hf", max_position_embeddings=60_000), tmp_path / "long")
    text = "word and " * 5_000
    command = [*COMMAND, "run", str(folder), "--raw", "-p", "-", "--context", "60000", "--max-tokens", "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(text.encode())
        process.stdin.close()
        process.stdin = None
        time.sleep(4)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in said
    assert time.monotonic() - started < 10


def test_inspect_for_people(int4: Path) -> None:
    result = edgetune("inspect", int4)
    assert result.returncode == 0
    text = result.stdout.decode()
    for word in (
        "bits per weight",
        "int4 block",
        "MatMulNBits",
        "<|im_end|>",
        "edgetune.base.sha256",
        "context_length",
    ):
        assert word in text


def test_inspect_for_programs(base: Path, file: Path, folder: Path, int4: Path) -> None:
    whole, gguf = (json.loads(edgetune("inspect", path, "--json").stdout) for path in (folder, file))
    for fact in ("parameters", "bits per weight"):
        assert whole["file"][fact] == gguf["file"][fact]
    assert whole["tokenizer"]["chat template sha256"] == gguf["tokenizer"]["chat template sha256"]
    assert whole["made from"]["edgetune.base.sha256"] == gguf["made from"]["edgetune.base.sha256"]
    assert whole["receipt"]["recipe"] == "f32"
    coded = json.loads(edgetune("inspect", int4, "--json", "--tensors").stdout)
    assert coded["file"]["parameters"] == gguf["file"]["parameters"]
    assert coded["file"]["bits per weight"] < 8
    assert sum(entry["share"] for entry in coded["types"].values()) == pytest.approx(1, abs=1e-3)
    assert any(name.startswith("int4") for name in coded["types"])
    assert len(coded["tensors"]) == coded["file"]["tensors"]


def test_the_ladder_has_both_rungs(run_directory: Path, folder: Path, int4: Path) -> None:
    result = edgetune("validate", run_directory, folder, int4, "--json", folder.parent / "report.json")
    content = json.loads((folder.parent / "report.json").read_text(encoding="utf-8"))
    *_, exact, coded = content["rungs"]
    assert (exact["file"], coded["file"]) == ("tiny-f32", "tiny-int4")
    assert (exact["is_quantized"], coded["is_quantized"]) == (False, True)
    assert exact["contract"]["holds"]
    assert coded["contract"]["holds"]
    assert exact["figures"]["kld"]["value"] < 1e-4 < coded["figures"]["kld"]["value"]
    assert result.returncode in (0, 3)


def test_validate_reads_all_weights(run_directory: Path, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    data = bytearray((copy / "model.onnx.data").read_bytes())
    data[len(data) // 2] ^= 64
    (copy / "model.onnx.data").write_bytes(data)
    result = edgetune("validate", run_directory, copy, "--no-task")
    assert result.returncode == 1
    assert "not the data" in sentence(result)


def test_a_missing_piece_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model.onnx.data").unlink()
    for command, *options in (("run", "-p", PROMPT), ("inspect",)):
        result = edgetune(command, copy, *options)
        assert result.returncode == 1
        assert "is missing" in sentence(result)
