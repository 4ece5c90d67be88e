"""`edgetune report`: write one HTML page about a run and its validated files."""

from __future__ import annotations

from pathlib import Path

import click

from edgetune.runs.directory import RunDirectory

FILE = "report.html"


@click.command(name="report")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("files", nargs=-1, metavar="[FILE]...", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help=f"Path of the page. Default: {FILE} in RUN.")
@click.option("--open", "open_", is_flag=True, help="Open the page in the browser.")
def command(run: Path, files: tuple[Path, ...], output: Path | None, open_: bool) -> None:
    """Write one HTML page about RUN and its validated files; it needs no network.

    The page shows the verdict, the ladder of measurements, size against divergence, the worst rows token by token,
    delta survival, training curves, the contract and the receipt. FILE is an exported file that was validated, or the
    output of `validate --json`. Default: all files in RUN/artifacts.

    \b
    Example:
      edgetune validate runs/mine runs/mine/artifacts/*.gguf
      edgetune report runs/mine --open
    """
    from edgetune.report import gather, page

    directory = RunDirectory.open(run)
    path = output or directory.path / FILE
    page.write_page(path, gather.gather(directory, files))
    click.echo(str(path))
    if open_:
        click.launch(str(path.resolve()))
