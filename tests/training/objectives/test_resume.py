"""Every objective on an NF4 base: a run that was stopped and resumed is bit for bit the uninterrupted one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgetune.config import parse_config
from edgetune.objectives import OBJECTIVES
from edgetune.reference.store import Reference
from edgetune.runs.directory import RunDirectory
from edgetune.training.run import train
from edgetune_converters.files.contents import sha256_of
from tests.training.interruptions import stop_after
from tests.training.objectives import encoded

FAST = ("dpo",)
OPTIONS: dict[str, dict[str, Any]] = {
    "grpo": {"num_generations": 4, "max_completion_length": 6, "rewards": [{"regex": "[a-z]"}]},
    "rloo": {"num_generations": 4, "max_completion_length": 6, "rewards": [{"regex": "[a-z]"}]},
}
STEPS, SAVE, STOPPED = 7, 3, 5
"""Eight rows in batches of four: the training is saved within an epoch and stopped within a later one."""


def settings(kind: str, base: Path, folder: Path) -> dict[str, Any]:
    options = {"max_steps": STEPS, "save_steps": SAVE, "eval_steps": 2}
    values = encoded.settings(base, folder, {"kind": kind, **OPTIONS.get(kind, {})}, **options)
    values["data"]["max_rows"] = 8
    del values["quantization"]
    return values


def curve(run: RunDirectory) -> list[dict[str, float]]:
    """The metrics without what depends on the clock."""
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


class StoppedError(Exception):
    """The process is gone."""


@pytest.mark.parametrize("kind", [
    pytest.param(kind, marks=[] if kind in FAST else pytest.mark.slow) for kind in OBJECTIVES
])  # fmt: skip
def test_a_resumed_training_is_the_uninterrupted_one_and_ends_in_a_run(
    kind: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = settings(kind, base, tmp_path)
    if kind == "distillation":
        values["objective"]["teacher"] = str(base)
    config = parse_config(values)
    whole = train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(STOPPED, patch, StoppedError)
        with pytest.raises(StoppedError):
            train(config, tmp_path / "resumed")
    resumed = train(config, tmp_path / "resumed", resume=True)
    assert curve(resumed) == curve(whole)
    hashes = [sha256_of(run.adapter / "adapter_model.safetensors") for run in (whole, resumed)]
    assert hashes[0] == hashes[1]
    results = whole.train_results
    assert results.steps == STEPS
    assert set(results.metrics) >= {metric.name for metric in OBJECTIVES[kind].facts.metrics[:1]}
    assert not list(whole.adapter.glob("ref*"))
    assert Reference.open(whole.reference).main_rows
