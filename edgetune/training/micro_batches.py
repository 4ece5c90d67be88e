"""Out of memory in a training: smaller micro-batches, accumulated, with the same rows in each optimizer step."""

from __future__ import annotations

import gc
from dataclasses import replace

import torch

from edgetune import console
from edgetune.objectives import Batching
from edgetune.planning.memory import TrainingLayout, layouts
from edgetune.planning.prepare import PreparedRun

OUT_OF_MEMORY = (MemoryError, RuntimeError)
"""The exceptions that may tell of missing memory: torch.OutOfMemoryError is a RuntimeError."""
_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


class StepOutOfMemory(Exception):
    """A step of the training found no memory; the model itself was loaded."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception tells of missing memory, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


def shrink(prepared: PreparedRun, layout: TrainingLayout, error: BaseException) -> tuple[PreparedRun, TrainingLayout]:
    """Return a training that needs less memory and has as many rows in each optimizer step; say so.

    The micro-batch is halved; with one row in it, the layout that keeps least in memory follows.

    Raises:
        BaseException: The given one, if nothing smaller is possible.
    """
    smaller = halve(prepared)
    if smaller is not None:
        return smaller, layout
    least = layouts(prepared.config)[-1]
    if layout == least:
        raise error
    console.warn(f"out of memory with micro-batches of one row; going on by {least.describe()}")
    return prepared, least


def halve(prepared: PreparedRun) -> PreparedRun | None:
    """Return the training with about half the micro-batch, and say so; None if there is no smaller one."""
    training = prepared.config.training
    smaller = _smaller(training.batch_size)
    if smaller is None:
        return None
    accumulation = training.gradient_accumulation * (training.batch_size // smaller)
    if list(prepared.config.objective.contradictions(Batching(smaller, accumulation))):
        return None
    console.warn(
        f"out of memory with micro-batches of {training.batch_size} rows; going on with {smaller} and {accumulation} "
        f"accumulated, so that the optimizer sees the same {training.batching.rows_of_step} rows a step "
        f"(training.batch_size: {smaller}, training.gradient_accumulation: {accumulation})"
    )
    changed = training.model_copy(update={"batch_size": smaller, "gradient_accumulation": accumulation})
    return replace(prepared, config=prepared.config.model_copy(update={"training": changed}))


def _smaller(batch: int) -> int | None:
    """Return the largest proper divisor of a batch; None for a batch of one row."""
    return next((each for each in range(batch // 2, 0, -1) if batch % each == 0), None)


def free_memory() -> None:
    """Give back the memory of a model that is no longer referenced."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
