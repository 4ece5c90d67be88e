"""`edgetune preview`: rendered rows, with the tokens that are trained on."""

from __future__ import annotations

import os
from datetime import datetime
from itertools import chain
from pathlib import Path

import click


@click.command(name="preview")
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--rows", "count", type=click.IntRange(min=1), default=3, show_default=True, help="Number of rows to show."
)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override an option of CONFIG (repeatable)."
)
def command(config: Path, count: int, overrides: tuple[str, ...]) -> None:
    """Render the first training rows of CONFIG as the model sees them.

    The tokens that are trained on are highlighted; without color they stand in ⟦brackets⟧. All rows are checked, also
    those of data.validation and data.test.

    \b
    Example:
      edgetune preview config.yaml --rows 5
    """
    from rich.console import Console

    from edgetune.config import load_config
    from edgetune.data.chat import ChatTemplate
    from edgetune.data.dataset import encode_all, read_splits
    from edgetune.data.preview import (
        count_rows,
        format_heading,
        format_moment,
        format_skipped,
        format_split,
        format_totals,
        format_unused,
        highlight_row,
    )
    from edgetune.data.problems import RowProblems
    from edgetune.data.text_tokenizer import TextTokenizer
    from edgetune.planning.base_model import find_base
    from edgetune.planning.task_rows import greedy_prompts, prepare_task_rows

    options = load_config(config, overrides)
    base = find_base(options, weights=False)
    template = ChatTemplate.from_directory(base.path, options.data.chat_template, options.template.options)
    template = template.at(datetime.now())
    tokenizer = TextTokenizer.from_directory(base.path, base.rows)
    problems = RowProblems(skip=options.data.on_bad_row == "skip")
    splits = read_splits(options.data, options.training.seed, problems)
    encoding = encode_all(template, tokenizer, splits.train, options.training.max_length, problems)
    held_out = encode_all(template, tokenizer, splits.validation, options.training.max_length, problems)
    limit = options.reference.task_rows
    test = prepare_task_rows(template, tokenizer, splits.test, options.data, limit, problems)
    greedy_prompts(template, tokenizer, held_out.chats, problems)
    problems.raise_if_any()
    usage = encoding.usage.merge([held_out.usage, test.usage])
    out = Console(highlight=False, soft_wrap=True)
    color = out.is_terminal and not os.environ.get("NO_COLOR")
    for number, row in enumerate(encoding.rows[:count], 1):
        out.print(format_heading(number, row), style="bold")
        out.print(highlight_row(row, tokenizer, color=color))
        out.print()
    out.print(f"{', '.join(splits.formats)}: {format_totals(encoding)}")
    if template.clock.is_read:
        out.print(format_moment(str(template.clock)), markup=False)
    out.print(f"checked too: {count_rows(len(held_out.chats), 'held-out')}, {count_rows(len(test.chats), 'test')}")
    trailing = encoding.trailing.merge([held_out.trailing, test.trailing])
    notes = (splits.notes, trailing.describe(), format_unused(usage), format_skipped(problems))
    for line in (*chain(*notes), *format_split(encoding)):
        out.print(line, markup=False)
