"""The time of a training on this device, from steps of its own trainer on twins of the base with one and two layers."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from transformers import TrainerCallback, set_seed

from edgetune.planning.memory import TrainingLayout
from edgetune.planning.prepare import PreparedRun
from edgetune.planning.twin import why_no_twin, write_twin
from edgetune.training import adapters
from edgetune.training.adapters.virtual_tokens import start_from_text, with_task
from edgetune.training.loading import compute_dtype, load_model, load_tokenizer
from edgetune.training.objectives import TrainerInputs, build_trainer
from edgetune.training.resident import keep_resident
from edgetune_converters.architectures import completed_config

MOST_TOKENS = 4096
"""Tokens of a step of the probe at most; a larger batch takes proportionally longer."""
_STEPS = 4
_PATIENCE = 20.0
_NEVER = 10**9


@dataclass(frozen=True)
class TimeProbe:
    """What was measured: seconds for a row, forward, backward and optimizer."""

    first: float
    """With one layer, the embedding and the head."""
    layer: float
    """For each further layer."""
    layers: int
    """Of the base."""
    batch: int
    """Rows of a step of the probe."""

    @property
    def row(self) -> float:
        """Seconds for a row of the whole base."""
        return self.first + (self.layers - 1) * self.layer

    def seconds(self, rows: float) -> float:
        """Return the seconds for so many rows."""
        return self.row * rows


def why_not_probed(prepared: PreparedRun) -> str | None:
    """Return why the time of a training cannot be measured so; None if it can."""
    if prepared.config.objective.facts.generates:
        return "most of it is the generation of answers, whose length is not known before"
    if prepared.config.adapter.reads_base or prepared.config.adapter.facts.taxonomy == "selective":
        return f"{prepared.config.adapter.title} starts from the whole base"
    return why_no_twin(prepared.base)


def probe_time(prepared: PreparedRun, layout: TrainingLayout) -> TimeProbe:
    """Measure some steps of the configured trainer on the first one and two layers of the base."""
    length = max(1, prepared.train.longest)
    batch = max(1, min(prepared.config.training.batch_size, MOST_TOKENS // length))
    one, two = (_seconds(prepared, layers, batch, layout) / batch for layers in (1, 2))
    layers = completed_config(prepared.base.checkpoint.config).layers
    return TimeProbe(min(one, two), max(two - one, 0.0), layers, batch)


def _seconds(prepared: PreparedRun, layers: int, batch: int, layout: TrainingLayout) -> float:
    """Return the median seconds of a step, after the first."""
    training = prepared.config.training.model_copy(
        update={
            "batch_size": batch, "gradient_accumulation": 1, "max_steps": _STEPS, "eval_steps": _NEVER,
            "save_steps": _NEVER,
        }
    )  # fmt: skip
    adapter = prepared.config.adapter
    if getattr(adapter, "layers", None) is not None:
        adapter = adapter.model_copy(update={"layers": None})
    config = prepared.config.model_copy(update={"training": training, "adapter": adapter})
    timer = _Timer()
    with tempfile.TemporaryDirectory(prefix="edgetune-plan-") as folder:
        (Path(folder) / "twin").mkdir()
        twin = write_twin(prepared.base, layers, Path(folder) / "twin")
        small = replace(prepared, config=config, base=twin)
        set_seed(config.training.seed)
        model = load_model(twin, config, Path(folder) / "base")
        if layout.resident:
            keep_resident(model, compute_dtype(config))
        adapted = adapters.add_adapter(model, adapter, prepared.base.layers, config.export.formats)
        start_from_text(adapted, adapter, prepared.tokenizer)
        inputs = TrainerInputs(
            with_task(adapted, config), load_tokenizer(small), small, Path(folder) / "steps", [timer], layout
        )
        trainer = build_trainer(inputs)
        adapters.set_optimizer(trainer, adapter)
        trainer.args.save_strategy = "no"
        trainer.train()
    return timer.median


class _Timer(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Measures steps, and stops the training when they are slow."""

    def __init__(self) -> None:
        self._begin = self._start = 0.0
        self._seconds: list[float] = []

    @property
    def median(self) -> float:
        """The median of the steps, without the first where there are others."""
        return median(self._seconds[1:] or self._seconds)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seconds.append(time.perf_counter() - self._begin)
        if time.perf_counter() - self._start > _PATIENCE and len(self._seconds) > 1:
            control.should_training_stop = True
        control.should_save = control.should_evaluate = False
