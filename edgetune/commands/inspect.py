"""`edgetune inspect`: what is in an exported file, or in a run directory, without loading a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from edgetune import console
from edgetune.runs.directory import RunDirectory


@click.command(name="inspect", short_help="Show what is in an exported file or a run directory.")
@click.argument("path", metavar="FILE|RUN", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor of a file.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
def command(path: Path, tensors: bool, as_json: bool) -> None:
    """Show what is in a GGUF file or an ONNX folder (types, tokenizer, receipt), or in a run directory.

    \b
    edgetune inspect runs/mine/artifacts/mine-q4_k_m.gguf --tensors
    edgetune inspect runs/mine/artifacts/mine-int4
    edgetune inspect runs/mine
    """
    facts = describe(path, tensors)
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        show(facts)


def describe(path: Path, tensors: bool) -> Mapping[str, Any]:
    """Section -> fact -> value, of whatever lies there."""
    from edgetune.inspect.gguf import describe_file, describe_run
    from edgetune.runtime.onnx.folder import is_onnx

    if is_onnx(path):
        from edgetune.inspect.onnx import describe_folder

        return describe_folder(path, tensors)
    return describe_run(RunDirectory.open(path)) if path.is_dir() else describe_file(path, tensors)


def show(facts: Mapping[str, Any]) -> None:
    """Sections of `name  value` lines; sections without facts are left out."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for section, entries in facts.items():
        lines = list(flat(entries))
        if not lines:
            continue
        grid.add_row(Text(section, style="bold"), "")
        for name, value in lines:
            grid.add_row("  " + name, Text(value))
    console.stdout().print(grid)


def flat(entries: Any) -> Iterator[tuple[str, str]]:
    """Lines of a section; what is None, or empty, is left out."""
    for name, value in entries.items():
        if value is None or value in ({}, []):
            continue
        yield str(name), in_words(str(name), value)


def in_words(name: str, value: Any) -> str:
    """Mappings on one line, sizes with units, shares in percent."""
    if isinstance(value, Mapping):
        parts = ((key, in_words(str(key), entry)) for key, entry in value.items() if entry is not None)
        return "  ".join(text if key in ("type", "shape", "bytes") else f"{key} {text}" for key, text in parts)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "shape":
        return "x".join(map(str, value))
    if name == "bytes":
        return f"{value:,} bytes" if value < 1e6 else f"{value / 1e6:,.1f} MB"
    if name in ("share", "same top", "task", "in another type than asked for") and isinstance(value, float):
        return f"{value:.1%}"
    if isinstance(value, int):
        return f"{value:,}" if value >= 100_000 else str(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
