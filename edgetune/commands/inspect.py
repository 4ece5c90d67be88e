"""`edgetune inspect`: what is in an exported file, or in a run directory, without loading a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from edgetune import console


@click.command(name="inspect")
@click.argument("path", metavar="FILE|RUN", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor of a file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def command(path: Path, tensors: bool, as_json: bool) -> None:
    """Show what is in FILE (a GGUF file or an ONNX folder) or in the run directory RUN.

    Of a file: size, storage types, tokenizer, receipt and validation. Of a run: configuration, data and artifacts. No
    model is loaded.

    \b
    Examples:
      edgetune inspect runs/mine/artifacts/mine-q4_k_m.gguf --tensors
      edgetune inspect runs/mine/artifacts/mine-int4-onnx
      edgetune inspect runs/mine
    """
    from edgetune.inspect.describe import describe

    facts = describe(path, all_tensors=tensors)
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        print_facts(facts)


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print sections of `name  value` lines; leave out sections without facts."""
    from rich.text import Text

    rows = []
    for section, entries in facts.items():
        lines = list(format_facts(entries))
        rows += [[Text(section, style="bold"), Text()]] if lines else []
        rows += [[Text("  " + name), Text(value)] for name, value in lines]
    console.print_columns(rows, (None, None))


def format_facts(entries: Any) -> Iterator[tuple[str, str]]:
    """Yield (name, value) of a section as text; leave out what is None or empty."""
    for name, value in entries.items():
        if value is None or value in ({}, []):
            continue
        yield str(name), format_value(str(name), value)


def format_value(name: str, value: Any) -> str:
    """Return a value as text: a mapping on one line, a size with its unit, a share in percent."""
    if isinstance(value, Mapping):
        parts = ((key, format_value(str(key), entry)) for key, entry in value.items() if entry is not None)
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
