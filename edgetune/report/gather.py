"""The data of a report: the validations of a run's files, their receipts, the manifest and the training log."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgetune.errors import RunDirectoryError
from edgetune.evaluation.results import EvaluationResults, read_evaluations
from edgetune.runs.directory import RunDirectory
from edgetune.runs.manifest import RunManifest
from edgetune.validation.numbers import number
from edgetune.validation.results import SUFFIX, Miss, Rung, Unmeasured, ValidationResults, results_path
from edgetune_converters.errors import ArtifactError
from edgetune_converters.provenance.receipts import Receipt


@dataclass(frozen=True)
class FileReport:
    """An exported file, with its results and its receipt."""

    name: str
    short: str
    """The part of the name that differs between the files: the storage type, as a rule."""
    rung: Rung
    validation: ValidationResults
    """The results that the rung is from."""
    receipt: Receipt | None
    is_stale: bool
    """Whether the file is newer than its validation."""

    @property
    def misses(self) -> list[Miss]:
        """The thresholds and checks that the file misses."""
        return self.validation.misses_of(self.name)

    @property
    def unmeasured(self) -> list[Unmeasured]:
        """The thresholds that were not measured."""
        return self.validation.unmeasured_of(self.name)

    @property
    def state(self) -> str:
        """pass, fail, none (no threshold is missed, but one was not measured) or unjudged (no threshold is set)."""
        if self.misses or self.unmeasured:
            return "fail" if self.misses else "none"
        return "pass" if self.validation.is_judged else "unjudged"

    @property
    def kld(self) -> float | None:
        """Mean KL divergence in nats per token."""
        return number(self.rung.figures.kld.value)

    @property
    def size(self) -> int | None:
        """Bytes."""
        return self.rung.size


@dataclass(frozen=True)
class ReportData:
    """All that a report shows."""

    name: str
    manifest: RunManifest
    log: list[Mapping[str, Any]]
    """The lines of logs/metrics.jsonl."""
    stored: list[Rung]
    """The rungs that are not files: base, trained, and the merged models that were captured."""
    files: list[FileReport]
    """Unquantized files first, then by decreasing size."""
    evaluations: list[EvaluationResults] = field(default_factory=list)
    """The evaluations that are stored in the run, the oldest first."""

    def rung(self, name: str) -> Rung | None:
        """Return the stored rung of this name ("base", "trained"), if there is one."""
        return next((rung for rung in self.stored if rung.name == name), None)

    @property
    def newest(self) -> ValidationResults:
        """The latest validation: its facts about the reference are shown."""
        return max((file.validation for file in self.files), key=lambda results: results.created)


def gather(run: RunDirectory, files: Sequence[Path] = ()) -> ReportData:
    """Read everything about `files`: exported files, or the output of `validate --json`. Default: all of the run.

    Raises:
        RunDirectoryError: No file was validated, or a validation cannot be read.
    """
    paths = [file if file.suffix == ".json" else results_path(file) for file in files]
    paths = paths or sorted(run.artifacts.glob(f"*{SUFFIX}"))
    if not paths:
        raise RunDirectoryError(
            f"no file in {run.artifacts} has been validated",
            f"Run `edgetune validate {run.path} FILE...` first, or name files that were validated elsewhere: "
            f"`edgetune report {run.path} FILE...`",
        )
    return report_data(run, [(read_results(path), path.parent) for path in paths])


def report_data(run: RunDirectory, validations: Sequence[tuple[ValidationResults, Path]]) -> ReportData:
    """Combine validations, each with the directory of its files. Of several of one file the newest counts."""
    found: dict[str, FileReport] = {}
    ordered = sorted(validations, key=lambda pair: pair[0].created)
    for results, directory in ordered:
        for rung in results.files:
            found[rung.name] = _file_report(rung, results, directory)
    if not found:
        raise RunDirectoryError("the validation holds no exported file", "Validate one and make the report again")
    shorts = short_names(list(found))
    files = [replace(file, short=shorts[name]) for name, file in found.items()]
    manifest = run.manifest
    return ReportData(
        name=str(manifest.config.get("name") or run.path.resolve().name),
        manifest=manifest,
        log=list(_log(run.metrics_file)),
        stored=ordered[-1][0].stored,
        files=sorted(files, key=lambda file: (file.rung.is_quantized, -(file.size or 0), file.name)),
        evaluations=read_evaluations(run),
    )


def read_results(path: Path) -> ValidationResults:
    """Read a validation of at least one exported file."""
    if not path.is_file():
        raise RunDirectoryError(f"{path} is missing: the file was not validated", ValidationResults.HINT)
    results = ValidationResults.read(path)
    if not results.files:
        raise RunDirectoryError(f"{path} is damaged: it is about no exported file", ValidationResults.HINT)
    return results


def _file_report(rung: Rung, results: ValidationResults, directory: Path) -> FileReport:
    artifact = directory / Path(str(rung.file)).name
    stored = results_path(artifact)
    validated, written = _modification_time(stored), _modification_time(artifact)
    is_stale = validated is not None and written is not None and validated < written
    return FileReport(rung.name, rung.name, rung, results, _receipt(artifact), is_stale)


def _modification_time(path: Path) -> float | None:
    """Return None for a file that is missing, or whose name the file system does not take."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _receipt(artifact: Path) -> Receipt | None:
    try:
        return Receipt.read(artifact)
    except ArtifactError:
        return None


def _log(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the readable lines; the log of a killed run may end in part of one."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and number(values.get("step")) is not None:
            yield values


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Remove the extension and the common beginning, up to a dash: `a-q8_0.gguf`, `a-q4_0.gguf` -> `q8_0`, `q4_0`."""
    stems = {name: name.removesuffix(".gguf") for name in names}
    parts = [stem.split("-") for stem in stems.values()]
    same = sum(1 for _ in itertools.takewhile(lambda each: len(set(each)) == 1, zip(*parts, strict=False)))
    shared = same if len(stems) > 1 else 0
    return {name: "-".join(stem.split("-")[shared:]) or stem for name, stem in stems.items()}
