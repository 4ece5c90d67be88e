"""Out of memory, a training goes on with smaller micro-batches; a diverged one leaves its batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from edgetune.config import load_config
from edgetune.errors import EnvironmentProblem
from edgetune.planning.prepare import prepare_run
from edgetune.runs.directory import RunDirectory
from edgetune.training import micro_batches
from edgetune.training.run import train
from edgetune_converters.files.contents import sha256_of
from tests.cli_runner import edgetune
from tests.training import runs


@pytest.fixture(scope="module")
def config(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("micro")
    return runs.write_config(folder / "config.yaml", runs.settings(base, folder, max_steps=4, save_steps=2))


def _limit_rows(patch: pytest.MonkeyPatch, rows: int, from_step: int = 0) -> list[int]:
    """Let steps of more rows run out of memory; return the rows of those that did not."""
    original, done = transformers.Trainer.training_step, list[int]()

    def step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        count = len(inputs["input_ids"])
        if count > rows and self.state.global_step >= from_step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        done.append(count)
        return original(self, model, inputs, *args, **kwargs)

    patch.setattr(transformers.Trainer, "training_step", step)
    return done


def _weights(run: RunDirectory) -> str:
    return sha256_of(run.adapter / "adapter_model.safetensors")


def test_smaller_micro_batches_give_the_adapter_of_such_a_configuration(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        done = _limit_rows(patch, 2)
        run = train(config, tmp_path / "run")
    said = " ".join(capfd.readouterr().err.split())
    assert "out of memory with micro-batches of 4 rows; going on with 2 and 2 accumulated" in said
    assert done == [2] * 8
    assert run.train_results.steps == 4
    assert run.train_results.model_dump()["micro_batch"] == 2
    assert run.manifest.config["training"]["batch_size"] == 4  # a resumption compares the options that were given
    asked = ["training.batch_size=2", "training.gradient_accumulation=2"]
    assert _weights(run) == _weights(train(config, tmp_path / "other", overrides=asked))
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]


def test_it_goes_on_from_the_last_checkpoint(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        done = _limit_rows(patch, 1, from_step=3)
        run = train(config, tmp_path / "run")
    said = " ".join(capfd.readouterr().err.split())
    assert "resuming after step 2" in said
    assert "going on with 1 and 4 accumulated" in said
    assert done[:3] == [4, 4, 4]
    assert run.train_results.steps == 4


def test_a_batch_of_one_row_that_does_not_fit_is_an_error(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _limit_rows(patch, 0)
        with pytest.raises(EnvironmentProblem, match="ran out of memory"):
            train(config, tmp_path / "run")


def test_other_errors_are_not_taken_for_missing_memory(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: Any, **__: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "training_step", step)
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            train(config, tmp_path / "run")


@pytest.mark.parametrize(("batch", "smaller"), [(8, 4), (6, 3), (5, 1), (9, 3)])
def test_the_smaller_batch_divides_the_larger(batch: int, smaller: int, config: Path) -> None:
    options = [f"training.batch_size={batch}", "training.gradient_accumulation=2"]
    prepared = prepare_run(load_config(config, options))
    halved = micro_batches.halve(prepared)
    assert halved is not None
    found = halved.config.training
    assert (found.batch_size, found.batching.rows_of_step) == (smaller, 2 * batch)


def test_missing_memory_of_the_cpu_is_known(config: Path) -> None:
    assert micro_batches.is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not micro_batches.is_out_of_memory(RuntimeError("shapes differ"))
    assert not micro_batches.is_out_of_memory(ValueError("out of memory"))


def test_a_diverged_training_leaves_the_rows_of_the_step(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = transformers.Trainer.training_step

    def step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, model, inputs, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 2 else loss

    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "training_step", step)
        result = edgetune("train", config, "-o", tmp_path / "run")
    assert result.returncode == 2
    said = " ".join(result.stderr.decode().split())
    file = tmp_path / "run/logs/diverged-step-3.jsonl"
    assert "training has diverged: the loss after step 3 is nan" in said
    assert f"the 4 rows of that step are in {file}" in said
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 4
    assert all(row["loss"] == "nan" and "lamp" in row["text"] for row in rows)
    assert all(row["tokens"] == len(row["ids"]) for row in rows)
