"""Callbacks of the trainer: metrics, progress, complete checkpoints, a clean stop after Ctrl-C."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich import progress
from transformers import TrainerCallback

from edgetune import console
from edgetune.errors import ConfigError
from edgetune.objectives import ObjectiveMetric
from edgetune.runs.directory import RunDirectory
from edgetune.training import checkpoints

Log = dict[str, float]


class TrainingDiverged(ConfigError):
    """The loss is no number any more."""


class Stopwatch:
    """Measures training time over interruptions, up to the checkpoint that was resumed and from there on."""

    def __init__(self, seconds_before: float = 0.0) -> None:
        self._before = seconds_before
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds until now; steps that were lost in an interruption do not count."""
        return self._before + time.perf_counter() - self._started


class MetricsCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Writes logs/metrics.jsonl, TensorBoard events and the progress bar from the logs of every step.

    Losses are averaged over `window` steps. Windows are counted from step 0, so that a resumed run has the curve of an
    uninterrupted one.
    """

    def __init__(self, run: RunDirectory, window: int, metrics: Sequence[ObjectiveMetric] = ()) -> None:
        self.run = run
        self.window = window
        self.metrics = metrics
        """What the objective logs beside the loss."""
        self.steps: list[Log] = []
        """Logs of the steps after the last full window."""
        self.losses: list[float] = []
        """The loss of each step."""
        self.evaluations: dict[int, float] = {}
        """Step -> evaluation loss."""
        self.evaluated: Log = {}
        """The metrics of the last evaluation."""
        self.tokens = 0.0
        self.seconds = 0.0
        self._window_tokens = 0.0
        self._window_seconds = 0.0
        self._step_started = 0.0
        self._progress = TrainingProgress()
        self._board: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start, also after a checkpoint."""
        self.restore(state)
        self._progress.start(state.global_step, state.max_steps)

    def restore(self, state: Any) -> None:
        """Restore losses and the open window of a checkpoint, and drop what was logged after it."""
        logged = [entry for entry in state.log_history if "loss" in entry]
        opened = state.global_step // self.window * self.window
        self.losses = [entry["loss"] for entry in logged]
        self.steps = [self._figures(entry) for entry in logged if entry["step"] > opened]
        evaluated = [entry for entry in state.log_history if "eval_loss" in entry]
        self.evaluated = self._named(evaluated[-1], "eval_") if evaluated else {}
        self.evaluations = {entry["step"]: entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}
        _truncate_metrics(self.run.metrics_file, state.global_step, self.evaluations)
        self._board = _open_tensorboard(self.run.logs, state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start timing the step, without evaluation and saving."""
        self._step_started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the time of the step."""
        self._window_seconds += time.perf_counter() - self._step_started

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Handle the logs of a step or an evaluation; the trainer's own summary at the end is ignored."""
        logs = logs or {}
        if "eval_loss" in logs:
            self._evaluated(state.global_step, logs["eval_loss"], self._named(logs, "eval_"))
        elif "loss" in logs:
            self._stepped(state.global_step, state.max_steps, logs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the progress bar; TensorBoard stays open for the last evaluation."""
        self._progress.stop()

    def close(self) -> None:
        """Close progress bar and TensorBoard, also after a failure."""
        self._progress.stop()
        if self._board is not None:
            self._board.close()

    @property
    def tokens_per_second(self) -> float:
        """Training speed over all full windows of this process."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def _stepped(self, step: int, last: int, logs: Mapping[str, float]) -> None:
        if not math.isfinite(logs["loss"]):
            cause = "Lower training.learning_rate"
            if step == 1:  # no weight has changed yet
                cause = "The base computes no finite numbers: its weights are damaged, or too large for compute_dtype"
            raise TrainingDiverged(f"training has diverged: the loss after step {step} is {logs['loss']}", cause)
        self.losses.append(logs["loss"])
        self.steps.append(self._figures(logs))
        total = logs.get("num_tokens", 0.0)
        self._window_tokens = total - self.tokens
        speed = self._window_tokens / self._window_seconds if self._window_seconds else 0.0
        if step % self.window == 0 or step == last:
            self._write(step, {**self.steps[-1], **self._means(), "tokens_per_second": round(speed, 1)})
            self.seconds += self._window_seconds
            self.tokens, self._window_seconds, self.steps = total, 0.0, []
        self._progress.update(step, logs["loss"], speed, _describe(self._named(logs), self.metrics[:_IN_BAR]))

    def _figures(self, logs: Mapping[str, float]) -> Log:
        """Return the figures of a step that are written."""
        kept = {key: logs[key] for key in ("loss", "learning_rate", "grad_norm") if key in logs}
        return {**kept, **self._named(logs)}

    def _named(self, logs: Mapping[str, float], prefix: str = "") -> Log:
        """Return the objective's metrics in a log of TRL under our names, without the prefix."""
        found = {metric.name: logs.get(prefix + metric.source) for metric in self.metrics}
        return {name: value for name, value in found.items() if value is not None}

    def _means(self) -> Log:
        """Return the loss and the objective's metrics as means over the window."""
        means = {}
        for name in ("loss", *(metric.name for metric in self.metrics)):
            values = [step[name] for step in self.steps if name in step]
            if values:
                means[name] = sum(values) / len(values)
        return means

    def _evaluated(self, step: int, loss: float, metrics: Log) -> None:
        self.evaluations[step], self.evaluated = loss, metrics
        self._write(step, {"eval_loss": loss, **{f"eval_{name}": value for name, value in metrics.items()}})
        console.note(f"step {step}: evaluation loss {loss:.4f}{_describe(metrics, self.metrics)}")

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.logs.mkdir(parents=True, exist_ok=True)
        with self.run.metrics_file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}", value, step)


class CheckpointCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Marks checkpoints as complete, with the training time until then, and keeps the last few."""

    def __init__(self, keep: int, stopwatch: Stopwatch) -> None:
        self.keep = keep
        self.stopwatch = stopwatch

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete the checkpoint that the trainer has just written, and delete the oldest one."""
        directory = Path(args.output_dir)
        checkpoint = directory / f"checkpoint-{state.global_step}"
        checkpoints.write_elapsed(checkpoint, self.stopwatch.seconds)
        checkpoints.mark_complete(checkpoint)
        checkpoints.prune(directory, self.keep)


class InterruptCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Stops on Ctrl-C: the first saves a checkpoint after the current step, a second one stops at once."""

    def __init__(self) -> None:
        self.requested = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop if that was requested; the end of training saves by itself."""
        if self.requested:
            control.should_save = True
            control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGINT while training. Outside the main thread signals cannot be handled, and are left alone."""

        def request(number: int, frame: Any) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True
            # not by the console: the signal may have arrived while it was writing, and it would write that again
            os.write(2, b"\nstopping after this step; press Ctrl-C again to stop at once\n")

        try:
            before = signal.signal(signal.SIGINT, request)
        except ValueError:
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


_IN_BAR = 3
"""Figures of the objective that are shown beside the loss."""
SECONDS_BETWEEN_LINES = 60


class TrainingProgress:
    """A progress bar on a terminal; elsewhere a line after every tenth of the steps, and at least one a minute."""

    def __init__(self) -> None:
        self._bar = progress.Progress(
            progress.TextColumn("training"), progress.BarColumn(), progress.MofNCompleteColumn(),
            progress.TextColumn("loss {task.fields[loss]:.4f}{task.fields[metrics]}"),
            progress.TextColumn("{task.fields[speed]:.0f} tokens/s"), progress.TimeRemainingColumn(),
            console=console.stderr(), disable=not console.stderr().is_terminal,
        )  # fmt: skip
        self._task: progress.TaskID | None = None
        self._total = 0
        self._printed = time.monotonic()

    def start(self, done: int, total: int) -> None:
        """Show the bar."""
        self._total = total
        self._bar.start()
        self._task = self._bar.add_task(
            "training", total=total, completed=done, loss=float("nan"), speed=0.0, metrics=""
        )

    def update(self, step: int, loss: float, speed: float, metrics: str = "") -> None:
        """Show the figures of a step."""
        if self._task is not None:
            self._bar.update(self._task, completed=step, loss=loss, speed=speed, metrics=metrics)
        tenths = 10 * step // self._total, 10 * (step - 1) // self._total
        due = tenths[0] != tenths[1] or step == 1 or time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES
        if due and not console.stderr().is_terminal:
            self._printed = time.monotonic()
            console.note(f"step {step}/{self._total}: loss {loss:.4f}{metrics}, {speed:.0f} tokens/s")

    def stop(self) -> None:
        """Remove the bar."""
        if self._task is not None:
            self._bar.stop()
            self._task = None


def _describe(figures: Mapping[str, float], metrics: Sequence[ObjectiveMetric]) -> str:
    """Return ", reward margin 0.123" for each of the metrics that was logged."""
    return "".join(
        f", {metric.name.replace('_', ' ')} {figures[metric.name]:.4g}" for metric in metrics if metric.name in figures
    )


def _truncate_metrics(file: Path, step: int, evaluated: Container[int]) -> None:
    """Drop lines about steps and evaluations that will be repeated, and a line that a kill cut off."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            entry = json.loads(line)
            if entry["step"] <= step and ("eval_loss" not in entry or entry["step"] in evaluated):
                kept.append(line + "\n")
    file.write_text("".join(kept), encoding="utf-8")


def _open_tensorboard(directory: Path, step: int) -> Any:
    """Return a TensorBoard writer, or None without TensorBoard; purge events after `step`, of an interrupted run."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory), purge_step=step + 1 if step else None)
