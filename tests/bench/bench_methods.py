"""Every method with the same data and the same number of steps: `make bench-methods`.

A cell is one method with one seed: train, export to q8_0 and q4_k_m, validate. Finished cells are lines of a JSON file,
so a stopped comparison resumes where it was. `--table` prints the Markdown table of what is there.

    make bench-methods                                        # samples/smart-home, all methods, three seeds: hours
    make bench-methods ARGS='--steps 40 --seeds 1 --methods lora,dora'
    make bench-methods ARGS='--sample smollm2 --base build/SmolLM2-135M-Instruct.Q4_1.gguf'
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from edgetune.runs.directory import RunDirectory
from edgetune.validation.results import Rung, ValidationResults
from tests.bench.method_variants import Variant, variants

ROOT = Path(__file__).parents[2]
TYPES = ("q8_0", "q4_k_m")
_TAIL = 400


@dataclass(frozen=True)
class Budget:
    """What all methods of a comparison share."""

    sample: str
    base: str | None
    steps: int | None
    task_rows: int | None

    def describe(self) -> str:
        """Return the budget in a few words, by which cells belong together."""
        steps = "the sample's steps" if self.steps is None else f"{self.steps} steps"
        rows = "the sample's test rows" if self.task_rows is None else f"{self.task_rows} test rows"
        return f"{self.sample}, {steps}, {rows}"


def main() -> None:
    arguments = _parser().parse_args()
    budget = Budget(arguments.sample, arguments.base, arguments.steps, arguments.task_rows)
    path = Path(arguments.out or ROOT / f"build/bench-methods/{arguments.sample}.jsonl")
    known = variants()
    names = arguments.methods.split(",") if arguments.methods else list(known)
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"unknown methods: {', '.join(unknown)}; known are {', '.join(known)}")
    if not arguments.table:
        _measure([known[name] for name in names], arguments.seeds, budget, path, arguments.seconds)
    print(format_table(read_cells(path), budget))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", default="smart-home", choices=["smart-home", "smollm2"])
    parser.add_argument("--base", help="base model in place of the sample's")
    parser.add_argument("--methods", help="names, separated by commas; default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="default: those of the sample")
    parser.add_argument("--task-rows", type=int, help="test rows that are answered; default: those of the sample")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no further cell after so many seconds")
    parser.add_argument("--out", help="file of the finished cells; default: build/bench-methods/SAMPLE.jsonl")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table")
    return parser


# -- measuring ---------------------------------------------------------------------------------------------------------


def _measure(chosen: Sequence[Variant], seeds: int, budget: Budget, path: Path, seconds: float) -> None:
    """Measure the cells that are missing, seed by seed, so that a stopped run has compared all methods equally."""
    end = time.monotonic() + seconds
    done = {(cell["method"], cell["seed"], cell["budget"]) for cell in read_cells(path)}
    for seed in range(seeds):
        for variant in chosen:
            if (variant.name, seed, budget.describe()) in done:
                continue
            if time.monotonic() > end:
                return
            cell = {"method": variant.name, "seed": seed, "budget": budget.describe(), **_cell(variant, seed, budget)}
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(cell) + "\n")  # behind the part of a line that a killed process left
            print(f"{variant.name} seed {seed}: {cell.get('error') or cell['task']}", file=sys.stderr, flush=True)


def read_cells(path: Path) -> list[dict[str, Any]]:
    """Read the finished cells; the last line of a killed process may be part of one."""
    if not path.is_file():
        return []
    cells = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            cells.append(json.loads(line))
        except ValueError:
            continue
    return cells


def _cell(variant: Variant, seed: int, budget: Budget) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="bench-methods-"))
    try:
        return _train_and_validate(variant, seed, budget, folder)
    except subprocess.CalledProcessError as error:
        return {"error": str(error.stderr)[-_TAIL:].strip()}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _train_and_validate(variant: Variant, seed: int, budget: Budget, folder: Path) -> dict[str, Any]:
    (folder / "config.yaml").write_text(yaml.safe_dump(configuration(variant, seed, budget)))
    run = folder / "run"
    peak = _edgetune("train", folder / "config.yaml", "-o", run)
    _edgetune("merge-export", run, "-q", ",".join(TYPES), "--allow-fallback")
    files = [path for type_ in TYPES for path in run.joinpath("artifacts").glob(f"*-{type_}.gguf")]
    _edgetune("validate", run, *files, "--json", folder / "v.json", accepted=(0, 3))
    results = ValidationResults.read(folder / "v.json")
    train = RunDirectory.open(run).train_results
    trained, base = results.rung("trained"), results.rung("base")
    return {
        "parameters": train.trainable_parameters,
        "loss": train.eval_loss,
        "seconds": train.seconds,
        "memory": peak,
        "task": _task(trained),
        "task_base": _task(base),
        "files": {type_: _figures(rung) for type_, rung in zip(TYPES, results.files, strict=True)},
    }  # fmt: skip


def configuration(variant: Variant, seed: int, budget: Budget) -> dict[str, Any]:
    """Return the configuration of a cell: that of the sample, with another adapter, learning rate and seed."""
    folder = ROOT / "samples" / budget.sample
    stated: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    stated["base"] = budget.base or _resolved(stated["base"], folder)
    for split in ("train", "validation", "test"):
        stated["data"][split] = _resolved(stated["data"][split], folder)
    stated["adapter"] = dict(variant.adapter)
    stated["training"] |= {"learning_rate": variant.learning_rate, "seed": seed}
    stated["quantization"] = {**stated.get("quantization", {}), "bits": variant.bits}
    stated["training"]["gradient_checkpointing"] = False  # some methods cannot, so none does
    if budget.steps is not None:
        stated["training"] |= {"max_steps": budget.steps, "eval_steps": budget.steps, "save_steps": budget.steps}
    if budget.task_rows is not None:
        stated["reference"] |= {"task_rows": budget.task_rows}
    stated.pop("gate", None)
    stated["export"] = {"types": list(TYPES)}
    return stated


def _resolved(value: str, folder: Path) -> str:
    return str(folder / value) if (folder / value).exists() else value


def _edgetune(*arguments: str | Path, accepted: Sequence[int] = (0,)) -> float:
    """Run a command of edgetune; return its peak memory in bytes."""
    command = [sys.executable, "-m", "edgetune.cli", *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        if child.returncode not in accepted:
            raise subprocess.CalledProcessError(child.returncode, command, stderr=errors.read())
    return usage.ru_maxrss * 1024.0


def _figures(rung: Rung) -> dict[str, Any]:
    figures = rung.figures
    return {"kld": figures.kld.value, "recovery": figures.recovery, "task": _task(rung), "bytes": rung.size}


def _task(rung: Rung | None) -> float | None:
    return rung.task.share if rung is not None and rung.task is not None else None


# -- the table ---------------------------------------------------------------------------------------------------------

_HEAD = (
    *("method", "bits", "seeds", "parameters", "task", "held-out loss", "MB", "s"),
    *(f"{what} {type_}" for type_ in TYPES for what in ("KLD", "recovery", "task")),
)


def format_table(cells: Sequence[Mapping[str, Any]], budget: Budget) -> str:
    """Return the Markdown table: means over the seeds, with standard deviations where there are several."""
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        if cell["budget"] == budget.describe():
            by_method.setdefault(cell["method"], []).append(cell)
    lines = [_HEAD, ["---"] * len(_HEAD), *_rows(by_method)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _rows(by_method: Mapping[str, list[Mapping[str, Any]]]) -> Iterator[Sequence[str]]:
    known = variants()
    for name, cells in by_method.items():
        bits = str(known[name].bits) if name in known else "–"
        good = [cell for cell in cells if "error" not in cell]
        if not good:
            yield [name, bits, "0", f"failed: {_cause(cells[0]['error'])}", *[""] * (len(_HEAD) - 4)]
            continue
        files = [
            _shown([cell["files"][type_][key] for cell in good], form)
            for type_ in TYPES
            for key, form in (("kld", "{:.2g}"), ("recovery", "{:.3f}"), ("task", "{:.1%}"))
        ]
        yield [
            name,
            bits,
            str(len(good)),
            f"{good[0]['parameters']:,}",
            _shown([cell["task"] for cell in good], "{:.1%}"),
            _shown([cell["loss"] for cell in good], "{:.4f}"),
            f"{max(cell['memory'] for cell in good) / 1e6:.0f}",
            f"{statistics.median(cell['seconds'] for cell in good):.0f}",
            *files,
        ]


def _cause(stderr: str) -> str:
    lines = stderr.splitlines()
    return next((line for line in lines if line.startswith("error: ")), lines[0] if lines else "no message")


def _shown(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return "–"
    mean = form.format(statistics.fmean(known))
    return mean if len(known) == 1 else f"{mean} ± {form.format(statistics.stdev(known))}"


if __name__ == "__main__":
    main()
