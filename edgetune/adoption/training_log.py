"""The training log that another trainer left, as lines of metrics.jsonl and as results of the stage `train`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROW = re.compile(r"^\|(.+)\|\s*$")
_KEYS: Mapping[str, tuple[str, ...]] = {
    "step": ("step", "current_steps", "Step", "global_step/max_steps"),
    "epoch": ("epoch", "Epoch"),
    "loss": ("loss", "Training Loss"),
    "eval_loss": ("eval_loss", "Validation Loss"),
    "learning_rate": ("learning_rate", "lr"),
    "grad_norm": ("grad_norm",),
}
"""Keys of metrics.jsonl -> their names in the logs of other trainers."""


@dataclass(frozen=True)
class TrainingLog:
    """A training as its trainer logged it."""

    source: Path | None = None
    """The file that was read."""
    lines: tuple[Mapping[str, Any], ...] = ()
    """Lines with the keys of metrics.jsonl: step, and what was logged of the others."""

    @property
    def results(self) -> dict[str, Any]:
        """The figures of the stage `train` that the log holds."""
        losses, held_out = self._values("loss"), self._values("eval_loss")
        steps, epochs = self._values("step"), self._values("epoch")
        found: dict[str, Any] = {"steps": int(max(steps, default=0)), "epochs": round(max(epochs, default=0.0), 4)}
        if losses:
            found |= {"loss_first": losses[0], "loss_last": losses[-1]}
        if held_out:
            found["eval_loss"] = held_out[-1]
        return found

    def _values(self, key: str) -> list[float]:
        return [float(line[key]) for line in self.lines if key in line]


def read_log(adapter: Path) -> TrainingLog:
    """Return the log beside an adapter, or in the directory around it; an empty one if there is none."""
    folders = (adapter, adapter.resolve().parent)
    for name, read in _READERS.items():
        for folder in folders if name != "README.md" else folders[:1]:
            path = folder / name
            lines = tuple(_lines(read(path))) if path.is_file() else ()
            if lines:
                return TrainingLog(path, lines)
    return TrainingLog()


def _lines(entries: Iterator[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield the entries that have a step and a figure, under the keys of metrics.jsonl."""
    for entry in entries:
        line: dict[str, Any] = {}
        for key, names in _KEYS.items():
            value = next((_number(entry[name]) for name in names if name in entry), None)
            if value is not None:
                line[key] = int(value) if key == "step" else value
        if "step" in line and line.keys() - {"step", "epoch"}:
            yield line


def _number(value: Any) -> float | None:
    text = str(value).partition("/")[0].strip()  # ms-swift writes 5/93
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # cut off where the training was stopped
            continue
        if isinstance(entry, dict):
            yield entry


def _trainer_state(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        stated = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError:
        return
    history = stated.get("log_history") if isinstance(stated, dict) else None
    yield from (entry for entry in history or [] if isinstance(entry, dict))


def _card(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of the table that Trainer writes into a model card."""
    head: Sequence[str] = ()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        row = _ROW.match(line)
        if row is None:
            head = ()
            continue
        cells = [cell.strip() for cell in row[1].split("|")]
        if "Step" in cells and "Training Loss" in cells:
            head = cells
        elif head and len(cells) == len(head):
            yield dict(zip(head, cells, strict=True))


_READERS = {
    "trainer_log.jsonl": _json_lines,  # LLaMA-Factory
    "logging.jsonl": _json_lines,  # ms-swift
    "trainer_state.json": _trainer_state,  # every checkpoint of transformers' Trainer
    "README.md": _card,
}
