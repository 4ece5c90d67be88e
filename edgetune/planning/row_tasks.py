"""The tasks of multitask prompt tuning: rows of all of them are trained on, and those held out are of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from edgetune import console
from edgetune.config import Config
from edgetune.data.chat_rows import ChatRow
from edgetune.data.dataset import Splits
from edgetune.data.row_store import RowStore
from edgetune.errors import ConfigError, DataError
from edgetune.methods.multitask_prompt_tuning import MultitaskPromptTuning


def check_task_options(config: Config) -> None:
    """Raise ConfigError for tasks without a key in the rows, a key without tasks, and a task that is none of them."""
    if problems := list(_problems(config)):
        raise ConfigError.of_many("problems with tasks", problems, "docs/soft-prompts.md has an example")


def _problems(config: Config) -> Iterator[str]:
    """Yield what is wrong with tasks and the options that name them, each a sentence that says what to do."""
    tasks, key, kind = _tasks(config), config.data.columns.task, config.adapter.kind
    chosen = config.export.prompt_task
    if key is not None and not tasks:
        yield (
            f"data.columns.task names the key {key!r}, and adapter.kind: {kind} has no adapter.tasks that it would "
            "choose from: set adapter.kind: multitask-prompt-tuning with adapter.tasks, or leave it out"
        )
    if chosen is not None and not isinstance(config.adapter, MultitaskPromptTuning):
        yield (
            f"export.prompt_task is {chosen}, and adapter.kind: {kind} has no tasks: leave it out, or set "
            "adapter.kind: multitask-prompt-tuning"
        )
    elif isinstance(chosen, str) and chosen not in tasks:
        known = f"adapter.tasks names {', '.join(tasks)}" if tasks else "adapter.tasks names none"
        yield f"export.prompt_task is {chosen!r}, and {known}: correct it, or leave it out"
    elif isinstance(chosen, int) and not 0 <= chosen < max(1, len(tasks)):
        yield (
            f"export.prompt_task is {chosen}, and the adapter has {max(1, len(tasks))} tasks, counted from 0: correct "
            "it, or leave it out"
        )
    if tasks and key is None:
        yield (
            f"adapter.tasks names {', '.join(tasks)}, and nothing says which rows are of which task: set "
            "data.columns.task to the key of the rows that holds the task"
        )
    if tasks and config.objective.kind != "sft":
        yield (
            f"adapter.tasks: objective.kind: {config.objective.kind} has no rows with tasks: set objective.kind: sft, "
            "or leave out adapter.tasks"
        )


def exported_task(config: Config) -> int:
    """Return the number of the task whose prompt is measured and exported; 0 for a method without tasks."""
    adapter = config.adapter
    return adapter.number_of(config.export.prompt_task) if isinstance(adapter, MultitaskPromptTuning) else 0


def keep_held_out_task(config: Config, splits: Splits) -> Splits:
    """Return the splits with held-out rows of the exported task alone, as a file holds the prompt of one task.

    Raises:
        DataError: A row has none of the tasks, or a task has no rows.
    """
    tasks = _tasks(config)
    if not tasks:
        return splits
    for row in (*splits.train, *splits.validation, *splits.test):
        if row.task not in tasks:
            stated = "no task" if row.task is None else f"the task {row.task!r}"
            raise DataError(
                f"{row.place} has {stated}, and adapter.tasks names {', '.join(tasks)}",
                "Correct the row, or add its task to adapter.tasks",
            )
    trained = {row.task for row in splits.train}
    if missing := [task for task in tasks if task not in trained]:
        raise DataError(
            f"adapter.tasks: no training row is of the task {missing[0]!r}", "Add rows, or leave out the task"
        )
    chosen = tasks[exported_task(config)]
    validation, test = (_of_task(rows, chosen) for rows in (splits.validation, splits.test))
    if not len(validation):
        raise DataError(
            f"no held-out row is of the task {chosen!r}, which is measured and exported",
            "Add such rows to data.validation, or choose another task with export.prompt_task",
        )
    console.note(
        f"{len(tasks)} tasks are trained; held-out rows of the task {chosen!r} alone are measured, as a file holds the "
        "prompt of one task (export.prompt_task)"
    )
    return replace(splits, validation=validation, test=test)


def _tasks(config: Config) -> list[str]:
    return config.adapter.tasks if isinstance(config.adapter, MultitaskPromptTuning) else []


def _of_task(rows: Sequence[ChatRow], task: str) -> RowStore:
    return RowStore(row for row in rows if row.task == task)
