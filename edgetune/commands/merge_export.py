"""`edgetune merge-export`: adapter and base in, GGUF files and other artifacts with their receipts out."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgetune import console
from edgetune.exporting.options import export_options

if TYPE_CHECKING:
    from edgetune_converters.quantization.recipes import StoragePlan

PLAN_COLUMNS = ("tensor", "shape", "from", "to", "bytes", "why")


def _refuse_tune(context: click.Context, option: click.Parameter, given: bool) -> None:
    if given:
        raise click.UsageError("--tune is now called --search-types", context)


@click.command(name="merge-export")
@click.argument("run", required=False, type=click.Path(path_type=Path))
@export_options
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="A .gguf file, a directory for onnx or safetensors, or a folder for several outputs.",
)
@click.option(
    "--base", type=click.Path(path_type=Path), help="Base model directory or GGUF file, in place of the run's."
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=click.Path(path_type=Path),
    help="PEFT adapter directory, with --base; several are combined with --adapter-weight.",
)
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Worker threads; 0 takes all cores.")
@click.option("--dry-run", is_flag=True, help="Show storage type and size of every tensor, then stop.")
@click.option("--plan", "dry_run_alias", is_flag=True, hidden=True)
@click.option("--tune", is_flag=True, hidden=True, expose_value=False, callback=_refuse_tune)
@click.option("--overwrite", is_flag=True, help="Replace existing files.")
def command(
    run: Path | None,
    output: Path | None,
    base: Path | None,
    adapters: tuple[Path, ...],
    threads: int,
    dry_run: bool,
    dry_run_alias: bool,
    overwrite: bool,
    **given: Any,
) -> None:
    """Merge the adapter of RUN into its base, quantize, and write the result, in one streaming pass.

    Options that are not given are taken from `export:` in the run's configuration. Without RUN, give --base.

    \b
    Examples:
      edgetune merge-export runs/mine -q q4_k_m,q8_0
      edgetune merge-export runs/mine -q q4_k_m --tensor-type 'ffn_down=q6_k' --dry-run
      edgetune merge-export runs/mine --format gguf,onnx -q q4_k_m,int4
      edgetune merge-export runs/mine --format gguf,safetensors,gguf-lora -q q4_k_m,bf16
      edgetune merge-export --base Llama-3.2-1B --adapter my-lora -q q4_k_m -o my.gguf
      edgetune merge-export --base Llama-3.2-1B --adapter a --adapter b --adapter-weight 0.7 --adapter-weight 0.3
    """
    # read when numpy is first imported: an export multiplies no matrices with numpy, whose idle threads would spin
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from edgetune.exporting.run import prepare_export
    from edgetune.exporting.source import find_source

    source = find_source(run, base, adapters[0] if adapters else None, adapters[1:])
    export = prepare_export(source, given, output, threads)
    if dry_run or dry_run_alias:
        plans, notes = export.plan()
        for plan in plans:
            _print_plan(plan)
        for text in notes:
            console.warn(text)
        return
    gc.freeze()  # collections during the export need not traverse what was imported
    receipts = export.run(overwrite=overwrite)
    said: set[str] = set()
    for receipt in receipts:
        for text in dict.fromkeys(receipt.notes):
            if text not in said:
                console.warn(text)
        said.update(receipt.notes)
        click.echo(f"{receipt.artifact}  {receipt.size / 1e6:.2f} MB, {receipt.bits_per_weight:.2f} bits per weight")
    for path in export.write_documents(receipts):
        click.echo(str(path))


def _print_plan(plan: StoragePlan) -> None:
    """Print one line for each tensor, then the real bits per weight."""
    from rich.table import Table

    table = Table(*PLAN_COLUMNS, title=plan.recipe.name, box=None, title_justify="left")
    for row in plan.rows:
        shape = "x".join(str(size) for size in row.shape)
        chosen = f"[yellow]{row.type}[/]" if row.fallback else row.type
        table.add_row(row.name, shape, row.source, chosen, f"{row.bytes:,}", row.reason)
    console.print_table(table)
    console.stdout().print(
        f"{plan.bytes:,} bytes, {plan.bits_per_weight:.3f} bits per weight, "
        f"{plan.fallback_share:.1%} of the bytes in another type than asked for\n"
    )
