"""`edgetune merge-export`: adapter and base in, GGUF files and other outputs with their receipts out."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgetune import console
from edgetune.errors import ConfigError
from edgetune.exporting import merge_base as merge_base_choice
from edgetune.exporting import onnx as onnx_export
from edgetune.exporting.options import byte_count, check_overrides, check_used, options, resolve
from edgetune.exporting.targets import NOTHING, Outputs, outputs_of, refuse_existing, refuse_foreign_cards
from edgetune.runs.directory import RunDirectory
from edgetune.runs.manifest import RunManifest

if TYPE_CHECKING:
    from edgetune.config import ExportConfig
    from edgetune_converters.exporting import Published
    from edgetune_converters.provenance.receipts import Receipt
    from edgetune_converters.quantization.overrides import Overrides
    from edgetune_converters.quantization.recipes import StoragePlan


# numpy's matrix products are of no use to an export, but its idle threads spin. Read when numpy is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

PLAN_COLUMNS = ("tensor", "shape", "from", "to", "bytes", "why")


@dataclass(frozen=True)
class Source:
    """What is exported: a base directory, an adapter or none, and where tokenizer and template come from."""

    name: str
    base: Path
    adapter: Path | None
    tokenizer: Path
    expected_base: Mapping[str, str] | None
    default_folder: Path
    manifest: RunManifest
    """The run's, an empty one without a run."""
    expected_adapter: Mapping[str, str] = field(default_factory=dict)
    carried: Mapping[str, str] = field(default_factory=dict)
    """Metadata by which `edgetune verify` knows the file."""

    @property
    def trained_on(self) -> Mapping[str, Any] | None:
        """What the run says of its 4-bit base."""
        return self.manifest.quantized

    @property
    def export(self) -> Mapping[str, Any]:
        """The `export:` section of the run."""
        section: Mapping[str, Any] = self.manifest.config.get("export", {})
        return section


@click.command(name="merge-export")
@click.argument("run", required=False, type=click.Path(path_type=Path))
@options
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="A .gguf file, a directory for onnx or safetensors, or a folder for several outputs.",
)
@click.option(
    "--base", type=click.Path(path_type=Path), help="Base model directory or GGUF file, in place of the run's."
)
@click.option("--adapter", type=click.Path(path_type=Path), help="PEFT adapter directory, with --base.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Worker threads; 0 takes every core.")
@click.option("--plan", "plan_only", is_flag=True, help="Show type and size of every tensor, then stop.")
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
def command(
    run: Path | None,
    output: Path | None,
    base: Path | None,
    adapter: Path | None,
    threads: int,
    plan_only: bool,
    overwrite: bool,
    **flags: Any,
) -> None:
    """Merge the adapter of RUN into its base, quantize, and write the result, in one streaming pass.

    Options that are not given are taken from `export:` in the run's configuration. Without RUN, give --base.

    \b
    Examples:
      edgetune merge-export runs/mine -q q4_k_m,q8_0
      edgetune merge-export runs/mine -q q4_k_m --tensor-type 'ffn_down=q6_k' --plan
      edgetune merge-export runs/mine --format gguf,onnx -q q4_k_m,int4
      edgetune merge-export runs/mine --format gguf,safetensors,gguf-lora -q q4_k_m,bf16
      edgetune merge-export --base Llama-3.2-1B --adapter my-lora -q q4_k_m -o my.gguf
    """
    source = find_source(run, base, adapter)
    config = resolve(source.export, flags)
    outputs = outputs_of(config, source.name, source.default_folder, output, flags["types"] is not None)
    check_overrides(config, outputs, flags)
    check_used(outputs, flags)
    if plan_only:
        for plan in plans_of(source, outputs, config):
            print_plan(plan)
        return
    onnx_export.refuse_tuning(config, outputs)
    refuse_existing(outputs.paths, overwrite)
    refuse_foreign_cards(outputs, config.card, overwrite)
    config, measured = merge_base_choice.decided(config, source, run, outputs, threads)

    def published(receipt: Receipt) -> None:
        replace(receipt, merge_base_kld=measured).write()

    receipts = run_all(source, outputs, config, threads, run, published)
    for receipt in receipts:
        for text in receipt.notes:
            console.warn(text)
        click.echo(f"{receipt.artifact}  {receipt.size / 1e6:.2f} MB, {receipt.bits_per_weight:.2f} bits per weight")

    write_documents(source, config, receipts)


def write_documents(source: Source, config: ExportConfig, receipts: Sequence[Receipt]) -> None:
    """The Modelfiles and cards that were asked for."""
    if config.modelfile:
        for receipt in receipts:
            write_modelfile(receipt)
    if config.card:
        from edgetune.publish import model_card

        for path in model_card.write_cards(source.name, receipts, source.base, source.manifest):
            click.echo(str(path))


def write_modelfile(receipt: Receipt) -> None:
    """For one GGUF file; Ollama opens neither parts nor, by this file, other formats."""
    from edgetune.publish import modelfile

    if receipt.format != "gguf":
        return
    if receipt.files:
        console.warn(f"no Modelfile for {Path(receipt.artifact).name}: Ollama does not open a file in parts")
        return
    path, derived = modelfile.write_modelfile(Path(receipt.artifact))
    click.echo(str(path))
    if derived.template is None or derived.note:
        console.warn(f"{path.name}: {derived.note or 'no TEMPLATE: ' + derived.reason}")


def overrides_of(config: ExportConfig) -> Overrides:
    """The types set by hand."""
    from edgetune_converters.quantization import overrides

    return overrides.overrides_of(config.tensor_types, config.output_tensor_type, config.token_embedding_type)


def plans_of(source: Source, outputs: Outputs, config: ExportConfig) -> list[StoragePlan]:
    """What would be written, for each output; the names of the tensors are those that they have there."""
    from edgetune_converters import planning
    from edgetune_converters.exporting import plan_export

    of: dict[str, Any] = {"adapter": source.adapter}
    chosen: dict[str, Any] = {"overrides": overrides_of(config), "imatrix": imatrix_of(config)}
    plans: list[StoragePlan] = []
    if outputs.gguf:
        plans += plan_export(source.base, tuple(outputs.gguf), **chosen, **of)
    if outputs.safetensors:
        plans += planning.plan_safetensors(source.base, tuple(outputs.safetensors), **of)
    if outputs.lora:
        plans += planning.plan_lora(source.base, tuple(outputs.lora), **of)
    if outputs.onnx:
        plans += onnx_plans(source, outputs, config)
    return plans


def onnx_plans(source: Source, outputs: Outputs, config: ExportConfig) -> Sequence[StoragePlan]:
    """Those of our own graphs; of a traced one, the weights as they will lie in its file."""
    from edgetune.exporting import traced
    from edgetune_converters import planning
    from edgetune_converters.exporting import plan_onnx

    family = traced.family_to_trace(source, outputs)
    if family is None:
        settings = onnx_export.settings_of(config)
        return plan_onnx(source.base, tuple(outputs.onnx), settings, adapter=source.adapter)
    traced.check(family, outputs, config)
    return planning.plan_traced(
        source.base, tuple(outputs.onnx), onnx_export.settings_of(config), adapter=source.adapter
    )


def imatrix_of(config: ExportConfig) -> Path | None:
    """The importance matrix."""
    return None if config.imatrix is None else Path(config.imatrix)


def find_source(run: Path | None, base: Path | None, adapter: Path | None) -> Source:
    """What the arguments name; ConfigError when they name nothing, or two things."""
    if run is None and base is None:
        raise ConfigError("nothing to export was named", "Give a run directory, or --base DIR (and --adapter DIR).")
    if run is not None and adapter is not None:
        raise ConfigError(f"both a run ({run}) and an adapter ({adapter}) were given", "Give one of them.")
    if run is None:
        assert base is not None
        name = (adapter or base).resolve().name.removesuffix(".gguf")
        return Source(name, base, adapter, adapter_tokenizer(base, adapter), None, Path.cwd(), RunManifest())
    from edgetune.reference import golden

    directory = RunDirectory.open(run)
    manifest = directory.manifest
    config = manifest.config
    return Source(
        name=config["name"],
        base=base or directory.base_directory(),
        adapter=directory.adapter,
        tokenizer=directory.tokenizer,
        expected_base=manifest.base.files,
        default_folder=directory.artifacts,
        manifest=manifest,
        expected_adapter=directory.trained_adapter,
        carried=golden.metadata(directory),
    )


def adapter_tokenizer(base: Path, adapter: Path | None) -> Path:
    """Trainers save the tokenizer (with the template they used) beside the adapter; it goes before the base's own."""
    return adapter if adapter is not None and (adapter / "tokenizer.json").is_file() else base


def run_all(
    source: Source, outputs: Outputs, config: ExportConfig, threads: int, run: Path | None, published: Published
) -> list[Receipt]:
    """The export; of a family without a description, the graphs are traced first and take their names last."""
    from edgetune.exporting import traced

    family = traced.family_to_trace(source, outputs)
    if family is None:
        return run_export(source, outputs, config, threads, run, published)
    traced.check(family, outputs, config)
    rest = replace(outputs, onnx={})

    def merge(folder: Path) -> Receipt:
        merged = replace(NOTHING, safetensors={"f32": folder})
        (receipt,) = run_export(source, merged, config, threads, run)
        return receipt

    with traced.prepared(family, source, outputs.onnx, config, merge) as publish:
        receipts = run_export(source, rest, config, threads, run, published) if rest.paths else []
        return [*receipts, *publish(published)]


def run_export(
    source: Source,
    outputs: Outputs,
    config: ExportConfig,
    threads: int,
    run: Path | None = None,
    published: Published | None = None,
) -> list[Receipt]:
    """The export, with a progress bar; `run` is measured on where choices are to be measured."""
    from edgetune_converters.exporting import export

    options: dict[str, Any] = {
        "adapter": source.adapter,
        "tokenizer": source.tokenizer,
        "imatrix": imatrix_of(config),
        "allow_fallback": config.allow_fallback,
        "threads": threads,
        "merge_base": config.merge_base,
        "trained_on": source.trained_on,
        "expected_base": source.expected_base,
        "expected_adapter": source.expected_adapter,
    }
    settings = onnx_export.chosen(source, run, outputs, config, options) if outputs.onnx else None
    gc.freeze()  # what was imported is not garbage: collections during the export need not look through it
    with console.byte_progress("export") as progress:
        return export(
            source.base,
            outputs.gguf,
            safetensors=outputs.safetensors,
            lora=outputs.lora,
            onnx=outputs.onnx,
            onnx_settings=settings,
            max_shard_size=byte_count(config.max_shard_size, "--max-shard-size"),
            overrides=overrides_of(config),
            split_max_size=byte_count(config.split_max_size, "--split-max-size"),
            measure_survival=config.survival,
            name=source.name,
            progress=progress,
            **options,
            extra_metadata=source.carried,
            published=published,
        )


def print_plan(plan: StoragePlan) -> None:
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
