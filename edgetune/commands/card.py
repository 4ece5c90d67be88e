"""`edgetune card`: a Hugging Face model card for files that were exported, with what has been measured since."""

from __future__ import annotations

from pathlib import Path

import click

from edgetune.errors import ConfigError
from edgetune.runs.directory import RunDirectory


@click.command(name="card", short_help="Write a Hugging Face model card for exported files.")
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path))
@click.option("--run", type=click.Path(path_type=Path), help="The run they are of: how it was trained.")
@click.option("--base", type=click.Path(path_type=Path), help="The base's directory: its name and license.")
@click.option("--name", help="The title. Default: the run's name, or that of the first file.")
@click.option("--overwrite", is_flag=True, help="Replace a README.md that was not made by edgetune.")
def command(files: tuple[Path, ...], run: Path | None, base: Path | None, name: str | None, overwrite: bool) -> None:
    """Write README.md beside each FILE (or into a model directory) from its receipt and its validation report.

    \b
    edgetune validate runs/mine runs/mine/artifacts/mine-q4_k_m.gguf
    edgetune card runs/mine/artifacts/mine-q4_k_m.gguf --run runs/mine
    """
    from edgetune.publish import model_card
    from edgetune_converters.provenance.receipts import Receipt

    receipts = [Receipt.read(file) for file in files]
    for path in sorted({model_card.card_path(receipt) for receipt in receipts}):
        if path.exists() and not overwrite and not model_card.is_generated(path):
            raise ConfigError(f"{path} was not made by edgetune", "Add --overwrite to replace it.")
    directory = RunDirectory.open(run) if run is not None else None
    manifest = directory.manifest if directory else {}
    if base is None and directory is not None:
        base = Path(manifest["base"]["path"])
    title = name or (manifest["config"]["name"] if directory else files[0].stem)
    for path in model_card.write_cards(title, receipts, base, manifest):
        click.echo(str(path))
