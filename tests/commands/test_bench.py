"""`edgetune bench`: what it measures, and what it refuses."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from edgetune.runtime.machine_fit import MachineFit, remember_fit
from tests.cli_runner import edgetune, edgetune_process, sentence
from tests.runtime import models


@pytest.fixture(scope="module", params=["gguf", "onnx"])
def artifact(request: pytest.FixtureRequest, base: Path, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return file if request.param == "gguf" else models.onnx(base, tmp_path_factory.mktemp("onnx") / "tiny-f32")


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.benchmarking.memory.PROBE_BYTES", 4 << 20)


def seconds_of(test: dict[str, Any]) -> float:
    """What the rates of a measurement say about its duration, without the round that is not counted."""
    tokens = (test["prompt_tokens"] or test["answer_tokens"]) if test["streams"] == 1 else test["answer_tokens"]
    return float(sum(test["streams"] * tokens / sample for sample in test["samples"]))


def test_prompts_answers_and_streams_are_measured(artifact: Path) -> None:
    begun = time.perf_counter()
    result = edgetune("bench", artifact, "-p", "24,8", "-n", "12", "--streams", "2,3", "-r", "2", "-t", "1,2", "--json")
    seconds = time.perf_counter() - begun
    assert result.returncode == 0
    found = json.loads(result.stdout)
    names = ["pp24", "pp8", "tg12", "2 streams", "3 streams"]
    assert [(test["threads"], test["test"]) for test in found["tests"]] == [(n, name) for n in (1, 2) for name in names]
    for test in found["tests"]:
        assert len(test["samples"]) == 2
        assert min(test["samples"]) > 0
        assert (test["first_token_seconds"] is None) is (test["streams"] == 1)
        assert (test["bandwidth_share"] is None) is (not test["test"].startswith("tg"))
    assert sum(map(seconds_of, found["tests"])) < seconds, "no rate is higher than the time permits"
    assert [each["threads"] for each in found["memory"]] == [1, 2]
    assert found["bytes_per_token"] > 0


def test_the_table_is_printed_and_what_is_0_is_left_out(artifact: Path) -> None:
    result = edgetune("bench", artifact, "-p", "8", "-n", "0", "--streams", "0", "-r", "1")
    assert result.returncode == 0
    lines = result.stdout.decode().splitlines()
    assert "pp8" in lines[2]
    assert lines[3] == "", "nothing else is measured"
    assert b"measuring" in result.stderr


def test_a_text_longer_than_the_training_is_named_before_anything_is_measured(artifact: Path) -> None:
    said = sentence(edgetune("bench", artifact, "-p", "300", "-n", "0"))
    assert "300 tokens are to be measured" in said
    assert "was made for 256" in said
    assert "at most 254" in said


def test_the_default_lengths_are_those_that_the_model_takes(artifact: Path) -> None:
    result = edgetune("bench", artifact, "--streams", "0", "-r", "1", "--json")
    assert [test["test"] for test in json.loads(result.stdout)["tests"]] == ["pp254", "tg128"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-p", "0", "-n", "0", "--streams", "0"], "nothing to measure"),
        (["-p", "1,x"], "'x' is not a valid integer"),
        (["-p", "-4"], "-4 is not in the range"),
        (["-t", "0"], "0 is not in the range"),
        (["-r", "0"], "0 is not in the range"),
        (["--streams", "1000"], "1000 is not in the range"),
    ],
)
def test_invalid_options_are_usage_errors(file: Path, options: list[str], said: str) -> None:
    result = edgetune("bench", file, *options)
    assert result.returncode == 2
    assert said in sentence(result)


def test_a_damaged_file_is_an_error_in_one_sentence(bad: Path) -> None:
    assert "bad.gguf" in sentence(edgetune("bench", bad))


def test_torch_is_not_imported(file: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('torch must not be imported')")
    result = edgetune_process(
        "bench", file, "-p", "8", "-n", "4", "--streams", "1", "-r", "1", PYTHONPATH=str(tmp_path)
    )
    assert result.returncode == 0, result.stderr.decode()


def test_what_fit_remembered_is_used_and_said(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("bench", file, "-p", "8", "-n", "0", "--streams", "2", "-r", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    remember_fit(file, MachineFit(threads=2, repacks=False))
    found = json.loads(edgetune(*few, "--json").stdout)
    assert found["fit"] == "2 threads, weights not repacked"
    assert {test["threads"] for test in found["tests"]} == {2}
    said = edgetune(*few, "-t", "1").stdout.decode()
    assert "settings: 2 threads, weights not repacked, as `edgetune fit` remembers; -t goes before" in said
    assert "| 1 |" in " ".join(said.split())
    plain = json.loads(edgetune(*few, "--no-fit", "--json").stdout)
    assert plain["fit"] is None
    assert {test["threads"] for test in plain["tests"]} == {1}
    assert "settings: the defaults" in edgetune(*few, "--no-fit").stdout.decode()
