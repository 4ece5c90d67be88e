"""What happens beside the optimisation: metrics, progress, complete checkpoints, a clean stop."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich import progress
from transformers import TrainerCallback

from edgetune import console
from edgetune.errors import ConfigError
from edgetune.runs.directory import RunDirectory
from edgetune.training import checkpoints

Log = dict[str, float]


class MetricsCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """logs/metrics.jsonl, TensorBoard events and the progress bar, from what the trainer logs at every step.

    Losses are averaged over `window` steps, counted from step 0 whatever was resumed, so that the curve of a resumed
    run is that of an uninterrupted one.
    """

    def __init__(self, run: RunDirectory, window: int) -> None:
        self.run = run
        self.window = window
        self.steps: list[Log] = []
        """Logs of the steps since the last full window."""
        self.losses: list[float] = []
        self.evaluations: dict[int, float] = {}
        self.tokens = 0.0
        self.seconds = 0.0
        self._window_tokens = 0.0
        self._window_seconds = 0.0
        self._step_started = 0.0
        self._bar = TrainingProgress()
        self._board: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start, or go on."""
        self.take_up(state)
        self._bar.start(state.global_step, state.max_steps)

    def take_up(self, state: Any) -> None:
        """Forget what a killed run logged after the checkpoint, and take up the window that was open then."""
        logged = [entry for entry in state.log_history if "loss" in entry]
        opened = state.global_step // self.window * self.window
        self.losses = [entry["loss"] for entry in logged]
        self.steps = [entry for entry in logged if entry["step"] > opened]
        self.evaluations = {entry["step"]: entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}
        _keep_until(self.run.metrics_file, state.global_step, self.evaluations)
        self._board = _tensorboard(self.run.logs, state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Time the step itself, without evaluation and saving."""
        self._step_started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add its time."""
        self._window_seconds += time.perf_counter() - self._step_started

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        """One call a step, one an evaluation, and a last one with the trainer's own summary, which is left out."""
        logs = logs or {}
        if "eval_loss" in logs:
            self._evaluated(state.global_step, logs["eval_loss"])
        elif "loss" in logs:
            self._stepped(state.global_step, state.max_steps, logs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar; the board stays open for the last evaluation."""
        self._bar.stop()

    def close(self) -> None:
        """Close bar and board, also after a failure."""
        self._bar.stop()
        if self._board is not None:
            self._board.close()

    @property
    def tokens_per_second(self) -> float:
        """Over all steps of this process."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def _stepped(self, step: int, last: int, logs: Mapping[str, float]) -> None:
        if not math.isfinite(logs["loss"]):
            raise ConfigError(
                f"training has diverged: the loss after step {step} is {logs['loss']}", "Lower training.learning_rate."
            )
        self.losses.append(logs["loss"])
        self.steps.append({key: logs[key] for key in ("loss", "learning_rate", "grad_norm") if key in logs})
        total = logs.get("num_tokens", 0.0)
        self._window_tokens = total - self.tokens
        speed = self._window_tokens / self._window_seconds if self._window_seconds else 0.0
        if step % self.window == 0 or step == last:
            loss = sum(each["loss"] for each in self.steps) / len(self.steps)
            self._write(step, {**self.steps[-1], "loss": loss, "tokens_per_second": round(speed, 1)})
            self.seconds += self._window_seconds
            self.tokens, self._window_seconds, self.steps = total, 0.0, []
        self._bar.update(step, logs["loss"], speed)

    def _evaluated(self, step: int, loss: float) -> None:
        self.evaluations[step] = loss
        self._write(step, {"eval_loss": loss})
        self._bar.evaluated(step, loss)

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.logs.mkdir(parents=True, exist_ok=True)
        with self.run.metrics_file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}", value, step)


class CheckpointCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Marks checkpoints as complete and keeps the last few."""

    def __init__(self, keep: int) -> None:
        self.keep = keep

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called when a checkpoint has been written."""
        directory = Path(args.output_dir)
        checkpoints.mark_complete(directory / f"checkpoint-{state.global_step}")
        checkpoints.prune(directory, self.keep)


class InterruptCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Ctrl-C: the first one saves a checkpoint after the current step and stops; a second one stops at once."""

    def __init__(self) -> None:
        self.requested = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop here, if asked to; the end of training saves by itself."""
        if self.requested:
            control.should_save = True
            control.should_training_stop = True

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Listen to SIGINT while training. Outside the main thread signals cannot be handled, and are left alone."""

        def request(number: int, frame: Any) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True
            console.note("\nstopping after this step; press Ctrl-C again to stop at once")

        try:
            before = signal.signal(signal.SIGINT, request)
        except ValueError:
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class TrainingProgress:
    """A bar on a terminal; a line at every tenth of the way elsewhere."""

    def __init__(self) -> None:
        self._bar = progress.Progress(
            progress.TextColumn("training"), progress.BarColumn(), progress.MofNCompleteColumn(),
            progress.TextColumn("loss {task.fields[loss]:.4f}"),
            progress.TextColumn("{task.fields[speed]:.0f} tokens/s"), progress.TimeRemainingColumn(),
            console=console.stderr(), disable=not console.stderr().is_terminal,
        )  # fmt: skip
        self._task: progress.TaskID | None = None
        self._total = 0

    def start(self, done: int, total: int) -> None:
        """Show it."""
        self._total = total
        self._bar.start()
        self._task = self._bar.add_task("training", total=total, completed=done, loss=float("nan"), speed=0.0)

    def update(self, step: int, loss: float, speed: float) -> None:
        """After a step."""
        if self._task is not None:
            self._bar.update(self._task, completed=step, loss=loss, speed=speed)
        tenths = 10 * step // self._total, 10 * (step - 1) // self._total
        if not console.stderr().is_terminal and (tenths[0] != tenths[1] or step == 1):
            console.note(f"step {step}/{self._total}: loss {loss:.4f}, {speed:.0f} tokens/s")

    def evaluated(self, step: int, loss: float) -> None:
        """After an evaluation."""
        console.note(f"step {step}: evaluation loss {loss:.4f}")

    def stop(self) -> None:
        """Hide it."""
        if self._task is not None:
            self._bar.stop()
            self._task = None


def _keep_until(file: Path, step: int, evaluated: Container[int]) -> None:
    """Drop lines about later steps and evaluations, which will be done again, and a line that a kill cut off."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            entry = json.loads(line)
            if entry["step"] <= step and ("eval_loss" not in entry or entry["step"] in evaluated):
                kept.append(line + "\n")
    file.write_text("".join(kept), encoding="utf-8")


def _tensorboard(directory: Path, step: int) -> Any:
    """A TensorBoard writer; events after `step`, of a run that was killed, are purged."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory), purge_step=step + 1 if step else None)
