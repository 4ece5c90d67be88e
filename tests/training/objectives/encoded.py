"""Rows, configurations and trainers of each objective, on the tiny base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from edgetune.config import parse_config
from edgetune.data.row_kinds import LABELLED, PAIR, PROMPT, TEXT, kinds_of
from edgetune.planning.memory import TrainingLayout
from edgetune.planning.prepare import PreparedRun, prepare_run
from edgetune.training import adapters, environment
from edgetune.training.loading import compute_dtype, load_model, load_tokenizer
from edgetune.training.objectives import TrainerInputs, build_trainer
from edgetune.training.resident import keep_resident
from tests.training import runs

FLOAT32 = {"bits": 16, "compute_dtype": "float32"}


def _row(kind: str, number: int) -> dict[str, Any]:
    colour, wrong = runs.COLOURS[number % 4], runs.COLOURS[(number + 1) % 4]
    question = f"lamp {number} {colour}?" + " please" * (number % 5)
    if kind == PAIR:
        return {"prompt": question, "chosen": colour, "rejected": f"{wrong} {wrong}"}
    if kind == LABELLED:
        is_good = number % 3 != 0
        return {"prompt": question, "completion": colour if is_good else wrong, "label": is_good}
    if kind == PROMPT:
        return {"prompt": question, "answer": colour}
    if kind == TEXT:
        return {"text": f"{question} It is {colour}, as lamps are. " * 3}
    answer = {"role": "assistant", "content": colour}
    return {"messages": [{"role": "user", "content": question}, answer]}


def write_rows(path: Path, objective: str, count: int, start: int = 0) -> Path:
    """Rows of the kind that the objective reads first."""
    rows = [_row(kinds_of(objective)[0], number) for number in range(start, start + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(base: Path, folder: Path, objective: dict[str, Any], **training: Any) -> dict[str, Any]:
    """A configuration of an objective in float32, with its rows."""
    values = runs.settings(base, folder, **training)
    for split, count, start in (("train", 64, 0), ("validation", 8, 64)):
        values["data"][split] = str(write_rows(folder / f"{split}.jsonl", objective["kind"], count, start))
    return {**values, "objective": objective, "quantization": FLOAT32}


def prepare(values: dict[str, Any]) -> PreparedRun:
    """The validated inputs of a training."""
    return prepare_run(parse_config(values))


@environment.silence_libraries()
def trainer_of(prepared: PreparedRun, directory: Path, layout: TrainingLayout | None = None) -> Any:
    """The trainer of the prepared run's objective."""
    config = prepared.config
    torch.manual_seed(config.training.seed)
    model = load_model(prepared.base, config)
    if layout is not None and layout.resident:
        assert keep_resident(model, compute_dtype(config))
    model = adapters.add_adapter(model, config.adapter)
    return build_trainer(TrainerInputs(model, load_tokenizer(prepared), prepared, directory, layout=layout))
