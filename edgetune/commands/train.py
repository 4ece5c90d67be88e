"""`edgetune train`: base and data in, run directory out."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from edgetune import console

RESUME = (
    "Go on with a run that was stopped, from its last checkpoint; a finished one takes new gate and export options."
)


@click.command(name="train", short_help="Fine-tune a base model with QLoRA and store what it says.")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Run directory. Default: runs/NAME.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override an option; may be repeated.")
@click.option("--resume", is_flag=True, help=RESUME)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace a run that is there; with --resume, only one whose options, rows or base are others now.",
)
@click.option("--dry-run", is_flag=True, help="Check base, data, export and disk; train nothing.")
def command(
    config: Path, output: Path | None, overrides: tuple[str, ...], resume: bool, overwrite: bool, dry_run: bool
) -> None:
    """Fine-tune the base that CONFIG names with QLoRA, and store what it says on held-out rows.

    \b
    edgetune train config.yaml -o runs/mine
    edgetune train config.yaml -o runs/mine --set training.epochs=2 --set adapter.r=32
    edgetune train config.yaml -o runs/mine --resume
    """
    from edgetune.config import load_config

    options = load_config(config, overrides)
    path = output or Path("runs") / options.name
    from edgetune.training import run as pipeline
    from edgetune.training.resume import TrainingInterrupted

    if dry_run:
        pipeline.dry_run(options, path, resume=resume, overwrite=overwrite)
        return
    try:
        run = pipeline.train(options, path, resume=resume, overwrite=overwrite)
    except (KeyboardInterrupt, TrainingInterrupted) as stop:
        _say_how_to_go_on(stop, config, path, overrides)
        click.get_current_context().exit(130)
    click.echo(pipeline.format_summary(run))


def _say_how_to_go_on(stop: BaseException, config: Path, path: Path, overrides: tuple[str, ...]) -> None:
    from edgetune.runs.directory import RunDirectory

    what = str(stop) or "stopped"
    if not RunDirectory(path).unfinished_file.is_file():
        console.note(f"{what}; nothing was written")
        return
    settings = [word for each in overrides for word in ("--set", each)]
    again = shlex.join(["edgetune", "train", str(config), "-o", str(path), *settings, "--resume"])
    console.note(f"{what}; go on with `{again}`")
