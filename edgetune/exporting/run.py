"""Run an export: measure what has to be measured, write the artifacts, then their documents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune import console
from edgetune.exporting import importance, merge_base, type_search
from edgetune.exporting.method_checks import check_method
from edgetune.exporting.options import resolve_options
from edgetune.exporting.request import check_overrides, check_used, export_request, warn_of_other_task
from edgetune.exporting.source import Source, find_source
from edgetune.exporting.targets import refuse_existing, refuse_foreign_cards, targets_of
from edgetune.exporting.through_peft import with_merged_layers
from edgetune.planning.export_checks import check_if_traced, check_search
from edgetune.runs.directory import RunDirectory
from edgetune.runtime.ngrams import NgramTable, path_beside
from edgetune_converters.gguf import reader
from edgetune_converters.names import AUTO

if TYPE_CHECKING:
    from edgetune.config import ExportConfig
    from edgetune_converters.provenance.receipts import Receipt
    from edgetune_converters.quantization.recipes import StoragePlan
    from edgetune_converters.request import ExportRequest


@dataclass(frozen=True)
class Export:
    """A checked export: the request, and the options that take effect before and after it."""

    source: Source
    config: ExportConfig
    request: ExportRequest

    def plan(self) -> tuple[list[StoragePlan], list[str]]:
        """Return the storage type and size of every tensor, for each target, and notes on base and adapter.

        Reads headers and the adapter.
        """
        from edgetune_converters.planning import plan_with_notes

        check_if_traced(self.request, self.config)
        with with_merged_layers(self.request, self.config.merge_base) as request:
            return plan_with_notes(request)

    def run(self, *, overwrite: bool = False) -> list[Receipt]:
        """Write the artifacts, each with its receipt. Raises ConfigError for an existing one without `overwrite`."""
        targets = self.request.targets
        check_search(self.config, targets)
        refuse_existing((target.path for target in targets), overwrite)
        refuse_foreign_cards(targets, self.config.card, overwrite)
        options = self.source.manifest.template_options
        if options:
            console.note(
                f"the model was trained with template options; give other programs than edgetune the same: "
                f"--chat-template-kwargs '{json.dumps(options)}' of llama-server, chat_template_kwargs elsewhere"
            )
        with with_merged_layers(replace(self.request, write_receipts=True), self.config.merge_base) as request:
            if self.config.merge_base == AUTO:
                request = merge_base.with_measured_merge_base(request, self.source)
            return self._write(request)

    def _write(self, request: ExportRequest) -> list[Receipt]:
        from edgetune.exporting import traced
        from edgetune_converters.exporting import export

        request = importance.with_measured_importance(request, self.source, self.config)
        request = traced.with_tracer(request, self.config)
        if self.config.search_types and request.paths("onnx"):
            request = type_search.with_searched_types(request, self.source)
        with console.byte_progress("export") as progress:
            receipts = export(request, progress=progress)
        _warn_of_other_bases(self.source, receipts[0])
        self._write_ngrams(receipts)
        traced.report_divergence(receipts)
        return receipts

    def _write_ngrams(self, receipts: Sequence[Receipt]) -> None:
        """Write the n-grams of the training answers beside GGUF files."""
        run = self.source.run
        for artifact in [Path(receipt.artifact) for receipt in receipts if receipt.format == "gguf"]:
            path = path_beside(artifact)
            path.unlink(missing_ok=True)  # of the file that was there before
            if run is not None and run.ngrams.is_file() and not self.config.no_ngrams:
                tokens: Any = reader.read(artifact).metadata.get("tokenizer.ggml.tokens", ())
                NgramTable.read(run.ngrams).for_vocabulary(tokens).write(path)
                console.note(f"{path}: n-grams of the training answers, from which run, chat and serve guess ahead")

    def write_documents(self, receipts: Sequence[Receipt]) -> list[Path]:
        """Write the Modelfiles and model cards that the options ask for, and return their paths."""
        paths = []
        if self.config.modelfile:
            paths += [path for receipt in receipts if (path := _write_modelfile(receipt))]
        if self.config.card:
            from edgetune.publish import model_card

            paths += model_card.write_cards(self.source.name, receipts, self.source.base, self.source.manifest)
        return paths


def prepare_export(source: Source, given: dict[str, Any], output: Path | None = None, threads: int = 0) -> Export:
    """Check the options and make the request; nothing of the model is read yet.

    Args:
        source: The model.
        given: Options over those of the run's configuration: field of the `export:` section -> value.
        output: The one artifact, or the folder for several; the source's own folder by default.
        threads: Worker threads; 0 takes all cores.

    Raises:
        ConfigError: Options cannot be used, or not together.
    """
    config = resolve_options(source.export_section, given)
    types_given = given.get("types") is not None
    targets = targets_of(config, source.name, source.default_folder, output, types_given)
    check_overrides(config, targets, given)
    check_used(targets, given)
    check_method(source, config, targets)
    warn_of_other_task(source, config)
    importance.check_importance(source, config, targets)
    return Export(source, config, export_request(source, config, targets, threads))


def export_run(
    run: RunDirectory | Path | str,
    *,
    formats: Sequence[str] | None = None,
    types: Sequence[str] | None = None,
    out: Path | str | None = None,
    base: Path | str | None = None,
    overwrite: bool = False,
    threads: int = 0,
    **options: Any,
) -> list[Receipt]:
    """Merge the adapter of a run into its base and write it, as `edgetune merge-export` does.

    Args:
        run: A finished run, or its directory.
        formats: gguf, onnx, safetensors, gguf-lora; those of the run's configuration by default.
        types: Storage types such as q4_k_m or int4; those of the run's configuration by default.
        out: The one artifact, or the folder for several; RUN/artifacts by default.
        base: Directory of the base, if it has moved since the training.
        overwrite: Replace artifacts that exist.
        threads: Worker threads; 0 takes all cores.
        options: Further fields of the `export:` section, such as `merge_base="nf4"` or `allow_fallback=True`.

    Returns:
        One receipt for each artifact; `receipt.artifact` is its path.

    Raises:
        EdgetuneError: Nothing was written, and the message says why.
    """
    given = options | {
        "formats": None if formats is None else list(formats),
        "types": None if types is None else list(types),
    }
    path = run.path if isinstance(run, RunDirectory) else Path(run)
    source = find_source(path, None if base is None else Path(base))
    export = prepare_export(source, given, None if out is None else Path(out), threads)
    receipts = export.run(overwrite=overwrite)
    export.write_documents(receipts)
    return receipts


def _warn_of_other_bases(source: Source, receipt: Receipt) -> None:
    """Warn of adapters whose runs were trained on other files than those that were merged."""
    for path, training in source.trainings.items():
        expected = training.base.files
        shared = expected.keys() & receipt.base.keys()
        differing = sorted(name for name in shared if expected[name] != receipt.base[name])
        if differing or (expected and not shared):
            names = ", ".join(differing) or ", ".join(sorted(expected))
            console.warn(
                f"{source.base} is not the base that the run {path} was trained on ({names} differ): "
                "what was written is not the model that was trained"
            )


def _write_modelfile(receipt: Receipt) -> Path | None:
    """Write the Modelfile of one GGUF file. Ollama opens neither split files nor, from a Modelfile, other formats."""
    from edgetune.publish import modelfile

    if receipt.format != "gguf":
        return None
    if receipt.files:
        console.warn(f"no Modelfile for {Path(receipt.artifact).name}: Ollama does not open a split file")
        return None
    path, derived = modelfile.write_modelfile(Path(receipt.artifact))
    if derived.template is None or derived.note:
        console.warn(f"{path.name}: {derived.note or 'no TEMPLATE: ' + derived.reason}")
    return path
