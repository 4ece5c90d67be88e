"""What `merge-export` does for ONNX alone: settings from options, plans, and choices by measurement."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune import console
from edgetune.errors import ConfigError
from edgetune.run_directory import RunDirectory

if TYPE_CHECKING:
    from edgetune.commands.export_paths import Outputs
    from edgetune.commands.merge_export import Source
    from edgetune.config import ExportConfig
    from edgetune_converters.onnx.plan import Settings

_TYPE = "int4"


def settings_of(config: ExportConfig) -> Settings:
    """What is chosen beside the type."""
    from edgetune_converters.onnx.plan import Settings

    return Settings(config.block_size, config.symmetric, config.portable)


def tuned(source: Source, run: Path | None, outputs: Outputs, options: dict[str, Any]) -> Settings:
    """Settings chosen by measurement, with a progress bar; `options` are those of the export.

    Errors: ConfigError where there is nothing to measure on, or nothing to choose.
    """
    from edgetune.reference import Reference
    from edgetune.validation import tuning
    from edgetune_converters.export import export, plan_onnx

    if run is None:
        raise ConfigError("--tune measures on the held-out rows of a run, and none was named", "Give a run directory.")
    rows = Reference.open(RunDirectory.open(run).reference).main_rows
    (plan,) = plan_onnx(source.base, [_TYPE], adapter=source.adapter)

    def make(settings: Settings, folder: Path) -> None:
        export(source.base, {}, onnx={_TYPE: folder}, onnx_settings=settings, **options)

    place = outputs.onnx[_TYPE].resolve().parent
    place.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".tune.", suffix=".partial", dir=place) as folder,
        console.count_progress("tune") as progress,
    ):
        return tuning.tune(make, plan, rows, Path(folder), progress)


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
