"""`edgetune train`: from a configuration to a run directory."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from edgetune import console

RESUME = "Resume an unfinished run from its last checkpoint; give a finished run new `gate:` and `export:` options."
OVERWRITE = "Replace an existing run. With --resume: only if its options, rows or base have changed."
DRY_RUN = "Check base model, data, export and disk space; train and write nothing."


@click.command(name="train")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Run directory. Default: runs/NAME.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override an option of CONFIG (repeatable)."
)
@click.option("--resume", is_flag=True, help=RESUME)
@click.option("--overwrite", is_flag=True, help=OVERWRITE)
@click.option("--dry-run", is_flag=True, help=DRY_RUN)
def command(
    config: Path, output: Path | None, overrides: tuple[str, ...], resume: bool, overwrite: bool, dry_run: bool
) -> None:
    """Fine-tune the base model of CONFIG, and capture its reference outputs on held-out rows.

    The result is a run directory, from which the other commands export, validate and report. Ctrl-C stops after the
    current step and saves a checkpoint.

    \b
    Examples:
      edgetune train config.yaml --dry-run
      edgetune train config.yaml -o runs/mine --set training.epochs=2 --set adapter.r=32
      edgetune train config.yaml -o runs/mine --resume
    """
    from edgetune.config import load_config
    from edgetune.training import run as training
    from edgetune.training.resume import TrainingInterrupted

    options = load_config(config, overrides)
    path = output or Path("runs") / options.name
    if dry_run:
        training.dry_run(options, path, resume=resume, overwrite=overwrite)
        return
    try:
        run = training.train(options, path, resume=resume, overwrite=overwrite)
    except (KeyboardInterrupt, TrainingInterrupted) as stop:
        _print_how_to_resume(str(stop) or "stopped", config, path, overrides)
        click.get_current_context().exit(130)
    click.echo(training.format_summary(run))


def _print_how_to_resume(what: str, config: Path, path: Path, overrides: tuple[str, ...]) -> None:
    from edgetune.runs.directory import RunDirectory

    if not RunDirectory(path).unfinished_file.is_file():
        console.note(f"{what}; nothing was written")
        return
    settings = [word for each in overrides for word in ("--set", each)]
    again = shlex.join(["edgetune", "train", str(config), "-o", str(path), *settings, "--resume"])
    console.note(f"{what}; resume with `{again}`")
