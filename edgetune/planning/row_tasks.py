"""The tasks of multitask prompt tuning: rows of all of them are trained on, and those held out are of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgetune import console
from edgetune.config import Config
from edgetune.data.chat_rows import ChatRow
from edgetune.data.dataset import Splits
from edgetune.data.row_store import RowStore
from edgetune.errors import ConfigError, DataError
from edgetune.methods.multitask_prompt_tuning import MultitaskPromptTuning


def check_task_options(config: Config) -> None:
    """Raise ConfigError for tasks without a key in the rows, and for a key without tasks."""
    tasks, key, number = _tasks(config), config.data.columns.task, config.export.prompt_task
    if key is not None and not tasks:
        raise ConfigError(
            f"data.columns.task names the key {key!r}, and adapter.kind: {config.adapter.kind} has no adapter.tasks "
            "that it would choose from",
            "Set adapter.kind: multitask-prompt-tuning with adapter.tasks, or leave it out",
        )
    if number is not None and not 0 <= number < max(1, len(tasks)):
        raise ConfigError(
            f"export.prompt_task is {number}, and the adapter has {max(1, len(tasks))} tasks, counted from 0",
            "Correct it, or leave it out",
        )
    if tasks and key is None:
        raise ConfigError(
            f"adapter.tasks names {', '.join(tasks)}, and nothing says which rows are of which task",
            "Set data.columns.task to the key of the rows that holds the task",
        )
    if tasks and config.objective.kind != "sft":
        raise ConfigError(
            f"adapter.tasks: objective.kind: {config.objective.kind} has no rows with tasks",
            "Set objective.kind: sft, or leave out adapter.tasks",
        )


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
    chosen = tasks[config.export.prompt_task or 0]
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
