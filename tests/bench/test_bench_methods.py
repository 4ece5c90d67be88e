"""The comparison of methods resumes, and its table holds what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgetune.config import parse_config
from tests.bench import bench_methods
from tests.bench.bench_methods import Budget, configuration, format_table, read_cells
from tests.bench.method_variants import variants

BUDGET = Budget("smart-home", None, 6, 4)
FIGURES = {"kld": 0.0123, "recovery": 0.98, "task": 0.5, "bytes": 1000}


def cell(task: float = 0.5) -> dict[str, Any]:
    return {
        "parameters": 1234, "loss": 0.25, "seconds": 3.0, "memory": 2e6, "task": task, "task_base": 0.0,
        "files": {"q8_0": FIGURES, "q4_k_m": FIGURES},
    }  # fmt: skip


def test_a_stopped_comparison_measures_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(variant: Any, seed: int, budget: Budget) -> dict[str, Any]:
        measured.append((variant.name, seed))
        return cell()

    monkeypatch.setattr(bench_methods, "_cell", measure)
    chosen = [variants()["lora"], variants()["ia3"]]
    path = tmp_path / "cells.jsonl"
    bench_methods._measure(chosen, 1, BUDGET, path, 1e9)
    with path.open("a") as file:
        file.write('{"method": "lora", "se')  # of a process that was killed
    bench_methods._measure(chosen, 2, BUDGET, path, 1e9)
    assert measured == [("lora", 0), ("ia3", 0), ("lora", 1), ("ia3", 1)]
    assert len(read_cells(path)) == 4
    bench_methods._measure(chosen, 2, Budget("smart-home", None, 7, 4), path, 0)
    assert len(measured) == 4  # another budget is another comparison; no time is left for it


def test_the_table_has_the_mean_and_the_deviation_over_the_seeds(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    common = {"method": "lora", "budget": BUDGET.describe()}
    lines = [common | {"seed": seed} | cell(task) for seed, task in enumerate((0.4, 0.6))]
    lines += [{**common, "method": "ia3", "seed": 0, "error": "it failed\nand more"}, {**lines[0], "budget": "another"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [
        [part.strip() for part in line.split("|")[1:-1]] for line in format_table(read_cells(path), BUDGET).split("\n")
    ]
    by_name = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    assert by_name["lora"]["seeds"] == "2"
    assert by_name["lora"]["task"] == "50.0% ± 14.1%"
    assert by_name["lora"]["parameters"] == "1,234"
    assert by_name["lora"]["KLD q4_k_m"].startswith("0.012")
    assert by_name["ia3"]["parameters"] == "failed: it failed"


@pytest.mark.parametrize("name", list(variants()))
@pytest.mark.parametrize("sample", ["smart-home", "smollm2"])
def test_every_method_has_a_valid_configuration(name: str, sample: str) -> None:
    stated = configuration(variants()[name], 1, Budget(sample, None, 6, 4))
    config = parse_config(stated, "bench")
    assert config.adapter.kind == variants()[name].adapter["kind"]
    assert config.training.max_steps == 6
