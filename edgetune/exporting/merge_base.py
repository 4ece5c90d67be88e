"""What `merge-export --merge-base auto` does before the export: it becomes one of the two by measurement."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune import console
from edgetune.errors import ConfigError
from edgetune.runs.directory import RunDirectory
from edgetune_converters.names import AUTO, ORIGINAL

if TYPE_CHECKING:
    from edgetune.commands.merge_export import Source
    from edgetune.config import ExportConfig
    from edgetune.exporting.measure_merge_bases import Choice
    from edgetune.exporting.targets import Outputs


def decided(
    config: ExportConfig, source: Source, run: Path | None, outputs: Outputs, threads: int
) -> tuple[ExportConfig, dict[str, float] | None]:
    """The configuration with a merge base that is one, and the mean KL divergences that decided (None: not measured).

    Errors: ConfigError where there is nothing to measure on.
    """
    if config.merge_base != AUTO:
        return config, None
    if run is None:
        raise ConfigError(
            "--merge-base auto measures on the held-out rows of a run, and none was named",
            "Give a run directory, or --merge-base original or nf4.",
        )
    if source.trained_on is None:
        console.note("merge base original: the run was trained on the base as it is")
        return config.model_copy(update={"merge_base": ORIGINAL}), None
    choice = _measured(source, RunDirectory.open(run), outputs, threads)
    console.note(choice.sentence)
    return config.model_copy(update={"merge_base": choice.name}), {
        name: mean.value for name, mean in choice.kld.items()
    }


def _measured(source: Source, run: RunDirectory, outputs: Outputs, threads: int) -> Choice:
    from edgetune.exporting import measure_merge_bases
    from edgetune.reference.store import Reference
    from edgetune_converters.exporting import export

    def make(name: str, file: Path) -> None:
        export(
            source.base, {measure_merge_bases.TYPE: file}, adapter=source.adapter, tokenizer=source.tokenizer,
            merge_base=name, trained_on=source.trained_on, expected_base=source.expected_base,
            expected_adapter=source.expected_adapter, threads=threads, allow_fallback=True,
        )  # fmt: skip

    reference = Reference.open(run.reference)
    place = outputs.paths[0].resolve().parent
    place.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".merge-base.", suffix=".partial", dir=place) as folder,
        console.count_progress("merge base") as progress,
    ):
        return measure_merge_bases.choose(make, reference, Path(folder), progress)
