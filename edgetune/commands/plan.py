"""`edgetune plan`: what a training and its files will take, before anything is paid."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command(name="plan")
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override an option of CONFIG (repeatable)."
)
@click.option(
    "--target", metavar="MACHINE",
    help="Propose settings for a machine with so much memory, such as '8GB laptop' or 24GiB.",
)  # fmt: skip
@click.option("--no-probe", is_flag=True, help="Measure nothing: no time of steps, no speed of this CPU.")
@click.option(
    "--try", "tries", is_flag=True,
    help="Also take two layers of the base through training, export, answer and validation.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the card as JSON.")
def command(
    config: Path, overrides: tuple[str, ...], target: str | None, no_probe: bool, tries: bool, as_json: bool
) -> None:
    """Show what the training of CONFIG takes: memory by part, disk, time, sizes and speed of its files.

    Time is measured in steps of this very training on one and two layers of the base, and extrapolated. The speed of a
    file follows from the measured bandwidth of this machine's memory. Base, rows, template and export are checked as by
    `edgetune train --dry-run`. Nothing is written.

    \b
    Examples:
      edgetune plan config.yaml
      edgetune plan config.yaml --target "8GB laptop"
      edgetune plan config.yaml --try
      edgetune plan config.yaml --set adapter.r=64 --json
    """
    from edgetune.config import load_config
    from edgetune.training.plan import make_plan

    options = load_config(config, overrides)
    card = make_plan(options, target=target, probe=not no_probe)
    if tries:
        from edgetune.exporting.rehearsal import rehearse

        card = card.with_section(rehearse(options))
    click.echo(json.dumps(card.as_json(), indent=2) if as_json else "\n".join(card.lines()))
