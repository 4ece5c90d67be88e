"""`edgetune merge-export`: adapter and base in, GGUF files with their receipts out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgetune import console
from edgetune.errors import ConfigError
from edgetune.run_directory import RunDirectory

if TYPE_CHECKING:
    from edgetune_converters.receipts import Receipt
    from edgetune_converters.recipes import Plan


PLAN_COLUMNS = ("tensor", "shape", "from", "to", "bytes", "why")


@dataclass(frozen=True)
class Source:
    """What is exported: a base directory, an adapter or none, and where tokenizer and template come from."""

    name: str
    base: Path
    adapter: Path | None
    tokenizer: Path
    expected_base: Mapping[str, str] | None
    default_types: tuple[str, ...]
    default_folder: Path
    allow_fallback: bool = False


@click.command(name="merge-export", short_help="Merge an adapter into its base and write quantized GGUF files.")
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option(
    "--format", "format_", type=click.Choice(["gguf"]), default="gguf", show_default=True, help="File format."
)
@click.option("-q", "--type", "types", help="File types, comma separated: q4_k_m,q8_0,f16,... Default: the run's own.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="A .gguf file, or a folder for several types.")
@click.option("--base", type=click.Path(path_type=Path), help="Base model directory, in place of the run's.")
@click.option("--adapter", type=click.Path(path_type=Path), help="PEFT adapter directory, with --base.")
@click.option("--allow-fallback", is_flag=True, help="Accept another type where rows do not divide a block.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Worker threads; 0 takes every core.")
@click.option("--plan", "plan_only", is_flag=True, help="Show type and size of every tensor, then stop.")
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
def command(
    run: Path | None,
    format_: str,
    types: str | None,
    output: Path | None,
    base: Path | None,
    adapter: Path | None,
    allow_fallback: bool,
    threads: int,
    plan_only: bool,
    overwrite: bool,
) -> None:
    """Merge the adapter of RUN into its base, quantize, and write GGUF files, in one streaming pass.

    \b
    edgetune merge-export runs/mine -q q4_k_m,q8_0
    edgetune merge-export --base Llama-3.2-1B --adapter my-lora -q q4_k_m -o my.gguf
    """
    source = find_source(run, base, adapter)
    wanted = tuple(part.strip().lower() for part in types.split(",") if part.strip()) if types else source.default_types
    outputs = output_paths(source, wanted, output)
    allow = allow_fallback or source.allow_fallback
    if plan_only:
        from edgetune_converters.export import plan_export

        for plan in plan_export(source.base, wanted, adapter=source.adapter):
            print_plan(plan)
        return
    refuse_existing(outputs, overwrite)
    for receipt in run_export(source, outputs, allow, threads):
        receipt.write()
        for text in receipt.notes:
            console.warn(text)
        click.echo(f"{receipt.artifact}  {receipt.size / 1e6:.2f} MB, {receipt.bits_per_weight:.2f} bits per weight")


def find_source(run: Path | None, base: Path | None, adapter: Path | None) -> Source:
    """What the arguments name; ConfigError when they name nothing, or two things."""
    if run is None and base is None:
        raise ConfigError("nothing to export was named", "Give a run directory, or --base DIR (and --adapter DIR).")
    if run is not None and adapter is not None:
        raise ConfigError(f"both a run ({run}) and an adapter ({adapter}) were given", "Give one of them.")
    if run is None:
        assert base is not None
        name = (adapter or base).resolve().name
        return Source(name, base, adapter, adapter_tokenizer(base, adapter), None, ("q4_k_m",), Path.cwd())
    directory = RunDirectory.open(run)
    manifest = directory.manifest
    config = manifest["config"]
    return Source(
        name=config["name"],
        base=base or directory.base_directory(),
        adapter=directory.adapter,
        tokenizer=directory.tokenizer,
        expected_base=manifest["base"]["files"],
        default_types=tuple(config["export"]["types"]),
        default_folder=directory.artifacts,
        allow_fallback=config["export"]["allow_fallback"],
    )


def adapter_tokenizer(base: Path, adapter: Path | None) -> Path:
    """Trainers save the tokenizer (with the template they used) beside the adapter; it goes before the base's own."""
    return adapter if adapter is not None and (adapter / "tokenizer.json").is_file() else base


def output_paths(source: Source, types: tuple[str, ...], output: Path | None) -> dict[str, Path]:
    """Storage type -> file to write."""
    if not types:
        raise ConfigError("-q names no type", "For instance -q q4_k_m, or -q q4_k_m,q8_0.")
    if output is not None and output.suffix == ".gguf":
        if len(types) > 1:
            raise ConfigError(f"{len(types)} types cannot be written to one file {output}", "Give a folder with -o.")
        return {types[0]: output}
    folder = output or source.default_folder
    return {type_: folder / f"{source.name}-{type_}.gguf" for type_ in types}


def refuse_existing(outputs: Mapping[str, Path], overwrite: bool) -> None:
    """An export that took an hour is not overwritten by a slip of the hand."""
    existing = [str(path) for path in outputs.values() if path.exists()]
    if existing and not overwrite:
        raise ConfigError(f"{', '.join(existing)} exists already", "Add --overwrite, or write elsewhere with -o.")


def run_export(source: Source, outputs: Mapping[str, Path], allow_fallback: bool, threads: int) -> list[Receipt]:
    """The export, with a progress bar."""
    from edgetune_converters.export import export

    with console.byte_progress("export") as progress:
        return export(
            source.base,
            outputs,
            adapter=source.adapter,
            tokenizer=source.tokenizer,
            allow_fallback=allow_fallback,
            threads=threads,
            name=source.name,
            progress=progress,
            expected_base=source.expected_base,
        )


def print_plan(plan: Plan) -> None:
    """One line a tensor: name, shape, source and chosen type, bytes, and why; then the real bits per weight."""
    from rich.table import Table

    table = Table(*PLAN_COLUMNS, title=plan.recipe.name, box=None, title_justify="left")
    for row in plan.rows:
        shape = "x".join(str(size) for size in row.shape)
        chosen = f"[yellow]{row.type}[/]" if row.fallback else row.type
        table.add_row(row.name, shape, row.source, chosen, f"{row.bytes:,}", row.reason)
    console.stdout().print(table)
    console.stdout().print(
        f"{plan.bytes:,} bytes, {plan.bits_per_weight:.3f} bits per weight, "
        f"{plan.fallback_share:.1%} of the bytes in another type than asked for\n"
    )
