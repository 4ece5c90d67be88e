"""`edgetune card`: a Hugging Face model card for exported files, with their measurements."""

from __future__ import annotations

from pathlib import Path

import click

from edgetune.errors import ConfigError
from edgetune.runs.directory import RunDirectory
from edgetune.runs.manifest import RunManifest


@click.command(name="card")
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path))
@click.option(
    "--run",
    type=click.Path(path_type=Path),
    help="Run directory that the files were exported from; adds how they were trained.",
)
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    help="Directory of the base model; adds its name and license. Default: the run's.",
)
@click.option("--name", help="Title of the card. Default: name of the run, or of the first file.")
@click.option("--overwrite", is_flag=True, help="Replace a README.md that edgetune did not write.")
def command(files: tuple[Path, ...], run: Path | None, base: Path | None, name: str | None, overwrite: bool) -> None:
    """Write README.md beside each FILE, or into a model directory, from its receipt and its validation.

    \b
    Example:
      edgetune validate runs/mine runs/mine/artifacts/mine-q4_k_m.gguf
      edgetune card runs/mine/artifacts/mine-q4_k_m.gguf --run runs/mine
    """
    from edgetune.publish import model_card
    from edgetune_converters.provenance.receipts import Receipt

    receipts = [Receipt.read(file) for file in files]
    for path in sorted({model_card.card_path(receipt) for receipt in receipts}):
        if path.exists() and not overwrite and not model_card.is_generated(path):
            raise ConfigError(f"{path} was not written by edgetune", "Add --overwrite to replace it")
    directory = RunDirectory.open(run) if run is not None else None
    manifest = directory.manifest if directory else RunManifest()
    if base is None and manifest.base.path:
        base = Path(manifest.base.path)
    title = name or (manifest.config["name"] if directory else files[0].stem)
    for path in model_card.write_cards(title, receipts, base, manifest):
        click.echo(str(path))
