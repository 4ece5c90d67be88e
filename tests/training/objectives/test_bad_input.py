"""What is wrong with the rows or options of an objective is said by `train --dry-run`, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgetune import cli
from tests.training import runs
from tests.training.objectives import encoded

ONLINE = {"kind": "grpo", "num_generations": 4, "max_completion_length": 6}


def dry_run(values: dict[str, Any], folder: Path, capfd: pytest.CaptureFixture[str], code: int = 1) -> str:
    """Return what a dry run that must fail writes, on one line."""
    config = runs.write_config(folder / "config.yaml", values)
    assert cli.run(["train", str(config), "-o", str(folder / "run"), "--dry-run"]) == code
    assert not (folder / "run").exists()
    written = capfd.readouterr()
    assert written.out == ""
    assert "Traceback" not in written.err
    return " ".join(written.err.split())


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return {}['missing']", "raises KeyError: 'missing'"),
        ("return 'good'", "returns 'good', which is no finite number"),
        ("return None", "returns None, which is no finite number"),
        ("return float('nan')", "returns nan, which is no finite number"),
    ],
)
def test_a_reward_function_that_gives_no_number_is_shown_with_row_and_answer(
    body: str, said: str, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rewards.py"
    file.write_text(f"def score(answer, row):\n    {body}\n")
    values = encoded.settings(base, tmp_path, {**ONLINE, "rewards": [{"python": f"{file}:score"}]})
    error = dry_run(values, tmp_path, capfd)
    assert f"the reward function {file}:score on train.jsonl, line 1, with the answer" in error
    assert said in error


def test_pairs_of_equal_answers_are_refused_with_their_line(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    values = encoded.settings(base, tmp_path, {"kind": "dpo"})
    rows = [{"prompt": f"lamp {n}?", "chosen": "on", "rejected": "on" if n == 2 else "off"} for n in range(16)]
    Path(values["data"]["train"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    error = dry_run(values, tmp_path, capfd)
    assert "train.jsonl, line 3: chosen and rejected are equal" in error
    values["data"]["on_bad_row"] = "skip"
    config = runs.write_config(tmp_path / "config.yaml", values)
    assert cli.run(["train", str(config), "-o", str(tmp_path / "run"), "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("objective", "rows", "said"),
    [
        ("sft", "dpo", "has chosen and rejected: these are rows for the objectives dpo, ipo, orpo, cpo, simpo, reward"),
        ("dpo", "sft", "these are rows for the objectives sft, distillation; the objective here is dpo"),
        ("kto", "dpo", "these are rows for the objectives dpo, ipo, orpo, cpo, simpo, reward"),
        ("sft", "pretrain", "these are rows for the objective pretrain; the objective here is sft"),
    ],
)
def test_rows_of_another_objective_are_refused_by_name(
    objective: str, rows: str, said: str, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    values = encoded.settings(base, tmp_path, {"kind": objective})
    encoded.write_rows(Path(values["data"]["train"]), rows, 16)
    error = dry_run(values, tmp_path, capfd)
    assert "train.jsonl, line 1" in error
    assert said in error


def test_all_contradictory_options_are_named_at_once(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    values = encoded.settings(base, tmp_path, {**ONLINE, "num_generations": 3, "beta": 0.1, "rewards": ["exact"]})
    values["adapter"] = {"kind": "lora", "init": "pissa"}
    values["export"] = {"merge_base": "nf4"}
    error = dry_run(values, tmp_path, capfd, code=2)
    assert "3 problems in" in error
    for problem in (
        "export.merge_base is nf4",
        "training.batch_size times training.gradient_accumulation is 4",
        "objective.kind: grpo compares the model",
    ):
        assert problem in error, problem
