"""`edgetune preview`: what the model sees of a row, and which of it is trained on."""

from __future__ import annotations

import os
from pathlib import Path

import click


@click.command(name="preview", short_help="Show how rows are rendered and which tokens are trained on.")
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--rows", "count", type=click.IntRange(min=1), default=3, show_default=True, help="How many rows to show."
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override an option; may be repeated.")
def command(config: Path, count: int, overrides: tuple[str, ...]) -> None:
    """Render the first training rows of CONFIG; what is trained on is highlighted, or in ⟦brackets⟧ without colour.

    \b
    edgetune preview config.yaml --rows 5
    """
    from rich.console import Console

    from edgetune.config import load_config
    from edgetune.data.chat import ChatTemplate
    from edgetune.data.dataset import encode_all, read_splits
    from edgetune.data.preview import format_heading, format_totals, highlight_row
    from edgetune.data.text_tokenizer import TextTokenizer
    from edgetune.planning.base_model import find_base

    options = load_config(config, overrides)
    base = find_base(options, weights=False)
    template = ChatTemplate.from_directory(base.path, options.data.chat_template)
    tokenizer = TextTokenizer.from_directory(base.path)
    splits = read_splits(options.data, options.training.seed)
    encoding = encode_all(template, tokenizer, splits.train, options.training.max_length)
    out = Console(highlight=False, soft_wrap=True)
    colour = out.is_terminal and not os.environ.get("NO_COLOR")
    for number, row in enumerate(encoding.rows[:count], 1):
        out.print(format_heading(number, row), style="bold")
        out.print(highlight_row(row, tokenizer, colour=colour))
        out.print()
    out.print(f"{', '.join(splits.formats)}: {format_totals(encoding)}")
    if encoding.rewritten:
        out.print(f"each assistant turn became a row of its own, since {encoding.rewritten}", markup=False)
