"""What a report is made of: the validations beside a run's files, their receipts, the manifest and the training log."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.errors import RunDirectoryError
from edgetune.report import shapes
from edgetune.report.numbers import entry, number
from edgetune.runs.directory import RunDirectory
from edgetune.validation.results import VERSION, json_path
from edgetune_converters.provenance.receipts import receipt_path

Json = Mapping[str, Any]
SUFFIX = ".validation.json"


@dataclass(frozen=True)
class FileReport:
    """An exported file, with all that is known of it."""

    name: str
    short: str
    """What tells it from the others: its type, as a rule."""
    rung: Json
    """Its figures."""
    validation: Json
    """The whole report that the figures are from."""
    receipt: Json
    """{} when there is none."""
    is_stale: bool
    """The file is newer than its validation."""

    @property
    def misses(self) -> list[Json]:
        """Thresholds and checks that it fails."""
        return [miss for miss in self.validation.get("misses", []) if miss.get("rung") == self.name]

    @property
    def kld(self) -> float | None:
        """Mean KL divergence in nats per token."""
        return number(entry(self.rung, "figures", "kld", "value"))

    @property
    def size(self) -> float | None:
        """Bytes."""
        return number(self.rung.get("size"))


@dataclass(frozen=True)
class ReportData:
    """All of it."""

    name: str
    manifest: Json
    log: list[Json]
    """The lines of logs/metrics.jsonl."""
    stored: list[Json]
    """Rungs that are no files: base, trained and, if they were captured, merged ones."""
    files: list[FileReport]
    """Unquantized files first, then the larger before the smaller."""

    def rung(self, name: str) -> Json:
        """The stored rung of this name ("base", "trained"); {} when it is not there."""
        return next((rung for rung in self.stored if rung.get("name") == name), {})

    @property
    def newest(self) -> Json:
        """The validation that was made last: rows, coding and device are taken from it."""
        return max((file.validation for file in self.files), key=lambda content: str(content.get("created")))


def gather(run: RunDirectory, files: Sequence[Path] = ()) -> ReportData:
    """Read everything about `files` (exported files, or what `validate --json` wrote); without any, all of the run.

    Raises RunDirectoryError when nothing was validated, or a report cannot be read.
    """
    paths = [_validation_of(file) for file in files] or sorted(run.artifacts.glob(f"*{SUFFIX}"))
    if not paths:
        raise RunDirectoryError(
            f"nothing in {run.artifacts} has been validated", f"First: edgetune validate {run.path} FILE..."
        )
    return material(run, [(read(path), path.parent) for path in paths])


def material(run: RunDirectory, validations: Sequence[tuple[Json, Path]]) -> ReportData:
    """From validations that are there already, each with the folder of its files; the newest of a file counts."""
    measured: dict[str, FileReport] = {}
    ordered = sorted(validations, key=lambda pair: str(pair[0].get("created")))
    for validation, folder in ordered:
        for rung in _files(validation):
            measured[str(rung["name"])] = _measured(rung, validation, folder)
    if not measured:
        raise RunDirectoryError("the validation holds no exported file", "Validate one and make the report again.")
    shorts = short_names(list(measured))
    found = [_renamed(file, shorts[name]) for name, file in measured.items()]
    return ReportData(
        name=str(run.manifest.config.get("name") or run.path.resolve().name),
        manifest=_manifest(run),
        log=list(_log(run.metrics_file)),
        stored=[rung for rung in ordered[-1][0]["rungs"] if not rung.get("file")],
        files=sorted(found, key=lambda file: (bool(file.rung.get("is_quantized")), -(file.size or 0), file.name)),
    )


def _manifest(run: RunDirectory) -> Json:
    return run.manifest.content()


def read(path: Path) -> Json:
    """A report of `validate`. Raises RunDirectoryError with what to do when it is none."""
    hint = "Validate the file again: its report is written anew."
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except FileNotFoundError:
        raise RunDirectoryError(f"{path} is missing: the file was not validated", hint) from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunDirectoryError(f"{path} cannot be read: {error}", hint) from None
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise RunDirectoryError(f"{path} is not a validation report of version {VERSION}", hint)
    wrong = shapes.problem(shapes.ValidationShape, text)
    if wrong or not any(rung.get("file") for rung in content["rungs"]):
        raise RunDirectoryError(f"{path} is damaged: {wrong or 'it is about no exported file'}", hint)
    whole: Json = content
    return whole


def _validation_of(file: Path) -> Path:
    return file if file.suffix == ".json" else json_path(file)


def _files(validation: Json) -> Iterator[Json]:
    return (rung for rung in validation["rungs"] if rung.get("file"))


def _measured(rung: Json, validation: Json, folder: Path) -> FileReport:
    artifact = folder / Path(str(rung["file"])).name
    report = json_path(artifact)
    is_stale = artifact.exists() and report.exists() and report.stat().st_mtime < artifact.stat().st_mtime
    return FileReport(str(rung["name"]), "", rung, validation, _receipt(artifact), is_stale)


def _renamed(file: FileReport, short: str) -> FileReport:
    return FileReport(file.name, short, file.rung, file.validation, file.receipt, file.is_stale)


def _receipt(artifact: Path) -> Json:
    try:
        text = receipt_path(artifact).read_text(encoding="utf-8")
        found: Json = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return {}
    return {} if shapes.problem(shapes.ReceiptShape, text) else found


def _log(path: Path) -> Iterator[Json]:
    """The lines that can be read; a run that was killed may end in half a one."""
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
    """`a-q8_0.gguf`, `a-q4_0.gguf` -> `q8_0`, `q4_0`: without the common beginning, up to a dash, and the extension."""
    stems = {name: name.removesuffix(".gguf") for name in names}
    parts = [stem.split("-") for stem in stems.values()]
    same = sum(1 for _ in itertools.takewhile(lambda each: len(set(each)) == 1, zip(*parts, strict=False)))
    shared = same if len(stems) > 1 else 0
    return {name: "-".join(stem.split("-")[shared:]) or stem for name, stem in stems.items()}
