"""What `merge-export` does for ONNX alone: settings from options, plans, and choices by measurement."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune import console
from edgetune.errors import ConfigError
from edgetune.runs.directory import RunDirectory

if TYPE_CHECKING:
    from edgetune.commands.merge_export import Source
    from edgetune.config import ExportConfig
    from edgetune.exporting.targets import Outputs
    from edgetune.reference.scored_rows import ScoredRows
    from edgetune.sensitivity.onnx.search import Make, Subject
    from edgetune_converters.onnx.plan import OnnxSettings

_TYPE = "int4"


def settings_of(config: ExportConfig) -> OnnxSettings:
    """What is chosen beside the type."""
    from edgetune_converters.onnx.plan import OnnxSettings

    return OnnxSettings(config.block_size, config.symmetric, config.portable)


def chosen(
    source: Source, run: Path | None, outputs: Outputs, config: ExportConfig, options: dict[str, Any]
) -> OnnxSettings:
    """Measured where that is asked for. Errors: ConfigError."""
    return tuned(source, run, outputs, options) if config.tune else settings_of(config)


def tuned(source: Source, run: Path | None, outputs: Outputs, options: dict[str, Any]) -> OnnxSettings:
    """Settings chosen by measurement, with a progress bar; `options` are those of the export.

    Errors: ConfigError where there is nothing to measure on, or nothing to choose.
    """
    from edgetune.sensitivity.onnx import search
    from edgetune_converters.exporting import export

    if run is None:
        raise ConfigError("--tune measures on the held-out rows of a run, and none was named", "Give a run directory.")

    def make(settings: OnnxSettings, folder: Path) -> None:
        export(source.base, {}, onnx={_TYPE: folder}, onnx_settings=settings, **options)

    subject = _subject(source, make, _rows(run), options)
    with _beside(outputs.onnx[_TYPE]) as folder, console.count_progress("tune") as progress:
        return search.tune(subject, folder, progress)


def _rows(run: Path) -> ScoredRows:
    from edgetune.reference.store import Reference

    return Reference.open(RunDirectory.open(run).reference).main_rows


def _subject(source: Source, make: Make, rows: ScoredRows, options: dict[str, Any]) -> Subject:
    """The model, its plans and how it is exported."""
    from edgetune.sensitivity.onnx.search import Subject
    from edgetune_converters.exporting import plan_onnx
    from edgetune_converters.merging.merge_base import merge_base_named
    from edgetune_converters.model import open_model
    from edgetune_converters.onnx.plan import OnnxSettings
    from edgetune_converters.quantization.imatrix import read_imatrix

    threads, imatrix = options["threads"], options["imatrix"]
    (plan,) = plan_onnx(source.base, [_TYPE], adapter=source.adapter)
    (apart,) = plan_onnx(source.base, [_TYPE], OnnxSettings(apart=True), adapter=source.adapter)
    merge_base = merge_base_named(options["merge_base"], options["trained_on"], threads)
    model = open_model(source.base, source.adapter, merge_base)
    return Subject(model, plan, apart, make, rows, imatrix and read_imatrix(imatrix), threads)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A directory beside the target that goes in every case; that of a pass that was killed goes first."""
    folder = path.resolve().with_name(path.name + ".tune.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def refuse_tuning(config: ExportConfig, outputs: Outputs) -> None:
    """Errors: ConfigError for options that leave nothing to choose."""
    if not config.tune:
        return
    if _TYPE not in outputs.onnx:
        raise ConfigError(
            "--tune chooses the blocks of int4 in ONNX, and none is asked for", "Add --format onnx -q int4."
        )
    if config.block_size or config.symmetric or config.portable:
        raise ConfigError(
            "--tune chooses the blocks itself, for ONNX Runtime's operators",
            "Leave out --block-size, --symmetric and --portable, or --tune.",
        )
