"""The ladder end to end: a file validated against itself, and against what does not fit it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgetune import console
from edgetune.config import GateConfig, parse_config
from edgetune.errors import ConfigError, RunDirectoryError
from edgetune.reference.scored_rows import ScoredRows
from edgetune.runs.directory import RunDirectory
from edgetune.validation import gate
from edgetune.validation.ladder import Ladder, Options, measure_ladder
from edgetune.validation.results import ValidationResults
from edgetune.validation.validate import validate_run
from tests.converters import tiny
from tests.export_requests import export
from tests.runtime import models
from tests.validation.runs import QUESTIONS, held_out, make_run


def ladder(run: RunDirectory, *files: Path, **options: object) -> Ladder:
    return measure_ladder(run, list(files), Options(**options), console.count_progress)  # type: ignore[arg-type]


def test_a_file_against_itself_is_at_the_floor(run: RunDirectory, whole: Path) -> None:
    found = ladder(run, whole)
    rung = found.files[0]
    assert rung.figures.kld.value == pytest.approx(found.trained.figures.kld.value, rel=1e-3)
    assert rung.figures.kld.value < 1e-7
    assert rung.figures.recovery == pytest.approx(1)
    assert rung.figures.same_top.value == 1
    assert rung.contract is not None
    assert rung.contract.holds
    assert rung.task is not None
    assert found.trained.task is not None
    assert rung.task.right == found.trained.task.right == len(QUESTIONS) - 1
    assert rung.task.same_as_trained == len(QUESTIONS)
    assert rung.notes == []
    everything = ["mean_kld_max=1e-6", "same_top_min=1", "recovery_min=0.999", "task_drop_max=0"]
    assert gate.check(found.rungs, gate.parse(everything, run.manifest.config)) == gate.GateResult()


def test_the_base_is_at_the_foot(run: RunDirectory, whole: Path) -> None:
    found = ladder(run, whole)
    assert found.base.figures.recovery == pytest.approx(0)
    assert found.base.figures.kld.value > 0.5
    assert found.base.task is not None
    assert found.base.task.right == 0


def test_fewer_rows_and_no_task(run: RunDirectory, whole: Path) -> None:
    found = ladder(run, whole, rows=2, with_task=False)
    assert len(found.rows) == 2
    assert found.files[0].figures.tokens == len(found.rows.positions) < len(found.reference.rows.positions)
    assert found.files[0].task is None


def test_a_top_k_reference_gives_a_lower_bound(
    base: Path, whole: Path, coarse: Path, run: RunDirectory, tmp_path: Path
) -> None:
    top_k = make_run(tmp_path / "run", base, whole, full_vocabulary_limit=10)
    full, bound = ladder(run, coarse, with_task=False), ladder(top_k, coarse, with_task=False)
    assert bound.reference.is_lower_bound
    assert 0.1 < bound.files[0].figures.kld.value < full.files[0].figures.kld.value
    assert bound.files[0].figures.cross_entropy.value == pytest.approx(full.files[0].figures.cross_entropy.value)


def test_a_file_of_another_vocabulary(run: RunDirectory, tmp_path: Path) -> None:
    other = models.gguf(models.base(tmp_path / "hf", vocab_size=541), tmp_path / "other.gguf")
    with pytest.raises(RunDirectoryError, match="vocabulary of 541 tokens, the reference one of 523"):
        ladder(run, other)


def test_a_file_of_another_base_fails(run: RunDirectory, tmp_path: Path) -> None:
    other = models.gguf(models.base(tmp_path / "hf", seed=9), tmp_path / "other.gguf")
    assert "another base" in ladder(run, other, with_task=False).files[0].mismatches[0]


def test_a_stale_export_fails(base: Path, run: RunDirectory, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    tiny.adapter(base, tmp_path / "run/adapter")
    trained = RunDirectory.open(tmp_path / "run")
    fresh = tmp_path / "fresh.gguf"
    export(base, {"f32": fresh}, adapter=trained.adapter, threads=1)
    stale_rung, fresh_rung = ladder(trained, whole, fresh, with_task=False).files
    assert "export again" in stale_rung.mismatches[0]
    assert fresh_rung.mismatches == []


def test_rows_longer_than_the_model_was_made_for(base: Path, whole: Path, run: RunDirectory, tmp_path: Path) -> None:
    shorter = tmp_path / "short.gguf"
    key = b"qwen2.context_length" + (4).to_bytes(4, "little")
    content = whole.read_bytes()
    assert key + (256).to_bytes(4, "little") in content
    shorter.write_bytes(content.replace(key + (256).to_bytes(4, "little"), key + (32).to_bytes(4, "little")))
    with pytest.raises(RunDirectoryError, match=r"49 tokens, .*short\.gguf was made for 32"):
        ladder(run, shorter)


def test_a_run_without_a_reference(run: RunDirectory, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/reference")
    with pytest.raises(RunDirectoryError, match="no reference"):
        ladder(RunDirectory.open(tmp_path / "run"), whole)


def test_rows_that_score_nothing(base: Path, whole: Path, tmp_path: Path) -> None:
    rows = held_out()
    late = ScoredRows(rows.tokens, rows.row_offsets, rows.positions[rows.positions > rows.row_offsets[1]])
    unscored = make_run(tmp_path / "run", base, whole, rows=late)
    assert np.isfinite(ladder(unscored, whole, with_task=False).files[0].figures.kld.value)
    with pytest.raises(RunDirectoryError, match="first 1 rows have no scored token"):
        ladder(unscored, whole, rows=1)


# -- thresholds --------------------------------------------------------------------------------------------------------

CONFIG = parse_config(
    {"base": "b", "data": {"train": "t"}, "gate": {"mean_kld_max": 0.5, "recovery_min": 0.9}}
).model_dump()


def test_every_threshold_of_the_configuration_is_checked() -> None:
    assert set(gate.THRESHOLDS) == set(GateConfig.model_fields)


def test_flags_override_the_configuration() -> None:
    assert gate.parse([], CONFIG) == GateConfig(mean_kld_max=0.5, recovery_min=0.9)
    assert gate.parse(["mean_kld_max=0.1", "recovery_min="], CONFIG) == GateConfig(mean_kld_max=0.1)


@pytest.mark.parametrize(
    ("flag", "what"),
    [
        ("mean_kld=0.1", "did you mean gate.mean_kld_max"),
        ("recovery_min=95", "gate.recovery_min is '95'"),
        ("same_top_min=97", "gate.same_top_min is '97'"),
        ("mean_kld_max", "no value"),
        ("same_top_min=2", "same_top_min"),
    ],
)
def test_flags_that_are_wrong(flag: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        gate.parse([flag], CONFIG)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("mean_kld_max=0.01", "mean KLD is"), ("same_top_min=0.99", "share of same top tokens is"),
        ("perplexity_ratio_max=0.5", "perplexity ratio is"), ("recovery_min=2", "recovery is"),
        ("task_drop_max=0", "drop of the task score is"),
    ],
)  # fmt: skip
def test_each_threshold_alone_closes_the_gate(run: RunDirectory, coarse: Path, flag: str, words: str) -> None:
    found = gate.check(ladder(run, coarse).rungs, gate.parse([flag], run.manifest.config)).misses
    assert [miss.figure for miss in found] == [flag.split("=")[0]]
    assert words in found[0].sentence


def test_a_recovery_that_is_not_defined_does_not_pass(run: RunDirectory, whole: Path) -> None:
    found = ladder(run, whole, with_task=False)
    rung = found.files[0]
    rung.figures.recovery = None
    misses = gate.check(found.rungs, gate.parse(["recovery_min=0.5"], run.manifest.config)).misses
    assert "not defined" in misses[0].sentence


@pytest.mark.parametrize(
    ("flag", "options"),
    [("task_drop_max=0", {"with_task": False}), ("long_kld_max=1", {}), ("long_kld_max=1", {"rows": 2})],
)
def test_a_threshold_that_was_not_measured_is_neither_met_nor_missed(
    run: RunDirectory, whole: Path, flag: str, options: dict[str, object]
) -> None:
    found = gate.check(ladder(run, whole, **options).rungs, gate.parse([flag], run.manifest.config))
    assert found.misses == []
    assert [(each.rung, each.figure) for each in found.unmeasured] == [(whole.name, flag.partition("=")[0])]
    (line,) = gate.unmeasured_warnings(found.unmeasured)
    assert "was not measured" in line


def test_long_rows_are_not_asked_for_by_the_limit_of_all_rows(run: RunDirectory, whole: Path) -> None:
    found = gate.check(ladder(run, whole).rungs, gate.parse(["mean_kld_max=1"], run.manifest.config))
    assert found == gate.GateResult()


def test_validate_run_returns_the_results_and_writes_nothing(run: RunDirectory, coarse: Path) -> None:
    before = sorted(coarse.parent.iterdir())
    found = validate_run(run.path, [coarse], gates=["mean_kld_max=0.01", "task_drop_max=1"], with_task=False)
    assert found.passed is False
    assert ([miss.figure for miss in found.misses], [each.figure for each in found.unmeasured]) == (
        ["mean_kld_max"], ["task_drop_max"]
    )  # fmt: skip
    assert found.files[0].lost is not None
    assert sorted(coarse.parent.iterdir()) == before
    again = ValidationResults.from_json(json.dumps(found.content()), coarse)
    assert again.content() == found.content()
