"""Rows and prompts against the context of the base: what training, capture and validate cannot take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgetune import console
from edgetune.config import Config
from edgetune.data.dataset import EncodedSplit
from edgetune.data.problems import RowProblems
from edgetune.errors import ConfigError, DataError
from edgetune.planning.base_model import ContextLimit
from edgetune.planning.task_rows import RenderedPrompt, TaskRow


def without_virtual_tokens(config: Config, context: ContextLimit) -> ContextLimit:
    """Return the context that virtual tokens before every text leave. Raises ConfigError if it is none."""
    taken = config.adapter.virtual_tokens
    if taken >= context.tokens:
        raise ConfigError(
            f"adapter.tokens is {taken}, and the base was made for {context.tokens} tokens: no text would fit",
            f"Set adapter.tokens to less than {context.tokens}",
        )
    return replace(context, tokens=context.tokens - taken, virtual=taken)


def check_rows(config: Config, context: ContextLimit, train: EncodedSplit, validation: EncodedSplit) -> None:
    """Raise DataError for rows that are longer than the context; a warning where training alone reads them."""
    limit = context.tokens
    hint = f"Set training.max_length: {limit}"
    held_out = max((len(row.input_ids) for row in validation.rows[: config.reference.rows]), default=0)
    if held_out > limit:
        raise DataError(
            f"a held-out row has {held_out} tokens, and the base was made for {context}: validate refuses such rows",
            hint,
        )
    longest = max(train.longest, validation.longest)
    if longest <= limit:
        return
    if context.is_fixed:
        raise DataError(f"a row has {longest} tokens, and the base has {context} positions", hint)
    count = sum(len(row.input_ids) > limit for rows in train.trained_rows for row in rows)
    console.warn(f"{count} training rows are longer than the context of the base ({context})")


def fitting_tasks(
    config: Config, context: ContextLimit, tasks: Sequence[TaskRow], problems: RowProblems
) -> list[TaskRow]:
    """Return the test rows whose prompt, and its answer where positions are fixed, fits the context.

    The others are added to `problems`.
    """
    limit, room = context.tokens, _room(config, context)
    found = []
    for task in tasks:
        count = len(task.prompt.ids)
        if count >= limit:
            problems.add(task.row.place, f"the prompt has {count} tokens, and the base was made for {context}")
        elif count + room > limit:
            problems.add(
                task.row.place,
                f"the prompt has {count} tokens; with reference.max_new_tokens ({room}) it passes the base's {limit} "
                "positions",
                "Lower reference.max_new_tokens, or shorten the row",
            )
        else:
            found.append(task)
    return found


def fitting_prompts(config: Config, context: ContextLimit, prompts: Sequence[RenderedPrompt]) -> list[RenderedPrompt]:
    """Return the held-out prompts that the model can answer; they are a sample, so others are left out."""
    return [prompt for prompt in prompts if len(prompt.ids) + _room(config, context) <= context.tokens]


def _room(config: Config, context: ContextLimit) -> int:
    return config.reference.max_new_tokens if context.is_fixed else 0
