"""`edgetune preview`: rendered rows, with the tokens that are trained on."""

from __future__ import annotations

import os
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from edgetune.config import Config, DataConfig


@click.command(name="preview")
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--rows", "count", type=click.IntRange(min=1), show_default="3; with --as all", help="Number of rows to show."
)
@click.option(
    "--as", "form", type=click.Choice(["messages"]), help="Write the rows as JSON lines of this format instead."
)
@click.option(
    "--of",
    "part",
    type=click.Choice(["train", "validation", "test"]),
    default="train",
    show_default=True,
    help="The rows that --as writes.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file that --as writes; else standard output.",
)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override an option of CONFIG (repeatable)."
)
def command(
    config: Path, count: int | None, form: str | None, part: str, output: Path | None, overrides: tuple[str, ...]
) -> None:
    """Render the first training rows of CONFIG as the model sees them.

    The tokens that are trained on are highlighted; without color they stand in ⟦brackets⟧. All rows are checked, also
    those of data.validation and data.test. `--as messages` writes what was understood of rows in any format, which read
    again is the same; the base model is not needed.

    \b
    Example:
      edgetune preview config.yaml --rows 5
      edgetune preview config.yaml --as messages -o rows.jsonl
    """
    from edgetune.config import load_config

    options = load_config(config, overrides)
    if form is None and output is not None:
        raise click.UsageError("--output needs --as messages")
    if form is not None:
        _write_rows(options.data, part, count, output, options.objective.kind)
    else:
        _show_rows(options, count or 3)


def _show_rows(options: Config, count: int) -> None:
    """Print the first rows as the model sees them, and what is to be said of all of them."""
    from rich.console import Console

    from edgetune.data.chat import ChatTemplate
    from edgetune.data.dataset import encode_all, read_splits
    from edgetune.data.preview import (
        count_rows,
        format_blank,
        format_moment,
        format_skipped,
        format_split,
        format_totals,
        format_unused,
        preview_rows,
    )
    from edgetune.data.problems import RowProblems
    from edgetune.data.text_tokenizer import TextTokenizer
    from edgetune.planning.base_model import find_base
    from edgetune.planning.task_rows import greedy_prompts, prepare_task_rows

    base = find_base(options, weights=False)
    template = ChatTemplate.from_directory(base.directory, options.data.chat_template, options.template.options)
    template = template.at(datetime.now())
    tokenizer = TextTokenizer.from_directory(base.directory, base.rows)
    problems = RowProblems(skip=options.data.on_bad_row == "skip")
    splits = read_splits(options.data, options.training.seed, problems, options.objective.kind)
    encoding = encode_all(template, tokenizer, splits.train, options.training.max_length, problems)
    held_out = encode_all(template, tokenizer, splits.validation, options.training.max_length, problems)
    limit = options.reference.task_rows
    test = prepare_task_rows(template, tokenizer, splits.test, options.data, limit, problems)
    greedy_prompts(template, tokenizer, held_out.chats, problems)
    problems.raise_if_any()
    usage = encoding.usage.merge([held_out.usage, test.usage])
    out = Console(highlight=False, soft_wrap=True)
    color = out.is_terminal and not os.environ.get("NO_COLOR")
    for shown in preview_rows(encoding, tokenizer, count, color=color):
        out.print(shown)
    out.print(f"{', '.join(splits.formats)}: {format_totals(encoding)}")
    if template.clock.is_read:
        out.print(format_moment(str(template.clock)), markup=False)
    out.print(f"checked too: {count_rows(held_out.items, 'held-out')}, {count_rows(len(test.chats), 'test')}")
    trailing = encoding.trailing.merge([held_out.trailing, test.trailing])
    written = encoding.written.merge([held_out.written, test.written])
    notes = (
        splits.notes, trailing.describe(), format_blank(encoding), written.describe(), format_unused(usage),
        format_skipped(problems),
    )  # fmt: skip
    for line in (*chain(*notes), *format_split(encoding)):
        out.print(line, markup=False)


def _write_rows(data: DataConfig, part: str, count: int | None, output: Path | None, objective: str) -> None:
    """Write rows in the format `messages`, and on standard error what of them is not used."""
    from edgetune import console
    from edgetune.data.dataset import read_part
    from edgetune.data.fitting import KeyUsage
    from edgetune.data.preview import count_rows, format_skipped, format_unused
    from edgetune.data.problems import RowProblems
    from edgetune.data.row_writer import write_rows
    from edgetune_converters.files.atomic import replacing

    problems = RowProblems(skip=data.on_bad_row == "skip")
    rows, formats, notes = read_part(data, part, problems, objective)
    usage = KeyUsage()
    for row in rows:
        for label in row.unread:
            usage.add(label, row.place)
    if output is None:
        with open(1, "w", encoding="utf-8", closefd=False) as file:  # UTF-8 in every locale
            write_rows(rows[:count], file)
    else:
        with replacing(output) as temporary, temporary.open("w", encoding="utf-8") as file:
            write_rows(rows[:count], file)
    console.note(f"{', '.join(formats)}: {count_rows(len(rows[:count]))} of data.{part} as messages")
    for line in (*notes, *format_unused(usage), *format_skipped(problems)):
        console.note(line)
