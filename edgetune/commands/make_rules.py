"""`edgetune make-rules`: the pipeline of a configuration as rules for GNU make."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(name="make-rules")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("-o", "--run", "run", type=click.Path(path_type=Path), help="Run directory. Default: runs/NAME.")
@click.option("--target", default="pipeline", show_default=True, help="Name of the target that makes everything.")
def command(config: Path, run: Path | None, target: str) -> None:
    """Print make rules for CONFIG: from its data to the run directory, the exported files and their validations.

    GNU make 4.3 or newer is needed. In a Makefile:

    \b
    Example:
      .edgetune.mk: config.yaml
              edgetune make-rules $< > $@.tmp && mv $@.tmp $@
      include .edgetune.mk
    """
    from edgetune.config import load_config
    from edgetune.exporting.make_rules import make_rules

    click.echo(make_rules(config, load_config(config), run, target), nl=False)
