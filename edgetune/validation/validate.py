"""Validate exported files against their run: the library function behind `edgetune validate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import edgetune
from edgetune.config import GateConfig
from edgetune.console import Progress
from edgetune.errors import ConfigError
from edgetune.runs.directory import RunDirectory
from edgetune.validation import gate
from edgetune.validation.ladder import Ladder, Options, ProgressBar, measure_ladder
from edgetune.validation.loss_stage import largest_loss
from edgetune.validation.meaning import explain
from edgetune.validation.results import ReferenceFacts, Rung, ValidationResults, outcome
from edgetune.validation.sample_size import caution

Attach = Callable[[Ladder, Rung], None]


@contextmanager
def silent(_: str) -> Iterator[Progress]:
    """Show no progress."""
    yield lambda done, total: None


def validate_run(
    run: RunDirectory | Path | str,
    files: Path | str | Sequence[Path | str],
    *,
    gates: Sequence[str] = (),
    rows: int | None = None,
    with_task: bool = True,
    threads: int | None = None,
    attach: Attach | None = None,
    bar: ProgressBar = silent,
) -> ValidationResults:
    """Measure exported files against the reference of a run, token by token, and check the gate.

    Nothing is written or printed, and a missed threshold is not an error: see `passed`, `misses` and `unmeasured`.

    Args:
        run: The run directory.
        files: GGUF files or ONNX directories, or one of them.
        gates: Thresholds such as "mean_kld_max=0.05", in place of those of the run's configuration.
        rows: Score only the first so many held-out rows.
        with_task: Answer the test rows, too.
        threads: CPU threads; None for the physical cores.
        attach: Called with the ladder and each measured file, to add further measurements to it.
        bar: Opens a progress bar with a description.

    Raises:
        ConfigError: A threshold is not known, or two files have the same name.
        RunDirectoryError: The run or its reference is missing, damaged, or of another base than a file.
        ArtifactError: A file cannot be opened, or was changed after its export.
    """
    directory = run if isinstance(run, RunDirectory) else RunDirectory.open(Path(run))
    paths = [Path(files)] if isinstance(files, Path | str) else [Path(file) for file in files]
    _check_distinct(paths)
    thresholds = gate.parse(gates, directory.manifest.config)
    ladder = measure_ladder(directory, paths, Options(rows, with_task, threads), bar)
    if attach is not None:
        for rung in ladder.files:
            attach(ladder, rung)
    return results_of(ladder, thresholds)


def results_of(ladder: Ladder, thresholds: GateConfig) -> ValidationResults:
    """Return the results of a measured ladder."""
    reference, tokens = ladder.reference, len(ladder.rows.positions)
    for rung in ladder.files:
        rung.lost = largest_loss(ladder.rungs, rung)
        rung.meaning = explain(rung, ladder.rungs, trained_in_4_bits=ladder.run.manifest.quantized is not None)
    found = gate.check(ladder.rungs, thresholds)
    return ValidationResults(
        edgetune=edgetune.__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        run=ladder.run.path.name,
        reference=ReferenceFacts(
            rows=len(ladder.rows),
            tokens=tokens,
            vocabulary=reference.vocab_size,
            caution=caution(len(ladder.rows), tokens),
            coding=reference.coding,
            kld_is_lower_bound=reference.is_lower_bound,
            info=reference.info,
        ),
        passed=outcome(found.misses, found.unmeasured),
        gate=thresholds.model_dump(),
        misses=found.misses,
        unmeasured=found.unmeasured,
        rungs=ladder.rungs,
    )


def _check_distinct(files: Sequence[Path]) -> None:
    """Raise ConfigError if two files have the same name, which is the name of their rungs."""
    names = [file.name for file in files]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ConfigError(f"two files are called {twice}", "Validate them one after the other")
