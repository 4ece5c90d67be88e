"""Every objective on an NF4 base: resumed bit for bit, its figures drawn, and its exported file the trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import edgetune
from edgetune.config import parse_config
from edgetune.exporting.run import export_run
from edgetune.objectives import OBJECTIVES
from edgetune.objectives.base import KL_OF_EVALUATIONS
from edgetune.reference.store import Reference
from edgetune.report.curves import curves
from edgetune.runs.directory import RunDirectory
from edgetune.training.run import train
from edgetune_converters.files.contents import sha256_of
from tests.training.interruptions import stop_after
from tests.training.objectives import encoded

FAST = ("dpo",)
OPTIONS: dict[str, dict[str, Any]] = {
    "grpo": {"num_generations": 4, "max_completion_length": 6, "rewards": [{"regex": "^[a-z]"}], "beta": 0.1},
    "rloo": {"num_generations": 4, "max_completion_length": 6, "rewards": [{"regex": "^[a-z]"}], "beta": 0.1},
}
F32_KLD = 1e-7
"""f32 on both sides, and the coding of the reference."""
STEPS, SAVE, STOPPED = 7, 3, 5
"""Eight rows in batches of four: the training is saved within an epoch and stopped within a later one."""


def settings(kind: str, base: Path, folder: Path) -> dict[str, Any]:
    options = {"max_steps": STEPS, "save_steps": SAVE, "eval_steps": 2}
    values = encoded.settings(base, folder, {"kind": kind, **OPTIONS.get(kind, {})}, **options)
    values["data"]["max_rows"] = 8
    del values["quantization"]
    values["export"] = {"types": ["f32"], "merge_base": "nf4"}
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
    check_curves(resumed, kind)
    (receipt,) = export_run(resumed)
    (rung,) = edgetune.validate(resumed, [receipt.artifact]).files
    assert rung.figures.kld.value < F32_KLD
    assert not rung.mismatches
    assert (rung.scores is not None) == (kind == "reward")


def check_curves(run: RunDirectory, kind: str) -> None:
    """Every figure that the objective states is among the curves of the report, in training and on held-out rows."""
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    drawn = {figure.name: figure for figure in curves(lines, kind).figures}
    assert list(drawn) == [metric.title for metric in OBJECTIVES[kind].facts.metrics]
    for metric in OBJECTIVES[kind].facts.metrics:
        figure = drawn[metric.title]
        assert [step for step, _ in figure.held_out] == [2, 4, 6, STEPS]
        is_trained = metric is not KL_OF_EVALUATIONS
        assert [step for step, _ in figure.training] == (list(range(1, STEPS + 1)) if is_trained else [])
