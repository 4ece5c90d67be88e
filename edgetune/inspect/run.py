"""Facts about a run directory, from its manifest and its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgetune.errors import RunDirectoryError
from edgetune.inspect.facts import Facts, read_sections, validation_facts
from edgetune.reference import store
from edgetune.runs.directory import RunDirectory
from edgetune.runs.status import RunStatus
from edgetune.runtime.artifacts import is_model


def describe(run: RunDirectory) -> Facts:
    """Return section -> fact -> value of a run; of one that is not finished, what is known so far."""
    return {**read_sections(run, _INPUTS), **_stage_facts(run), **read_sections(run, _RESULTS)}


def _run_facts(run: RunDirectory) -> Facts:
    facts: Facts = {"path": str(run.path), "name": run.manifest.config.get("name")}
    status = run.status
    if status is RunStatus.FINISHED:
        return facts
    how = "a process is writing it" if status is RunStatus.RUNNING else "complete it with edgetune train --resume"
    return {**facts, "status": f"{status}: {how}"}


def _base_facts(run: RunDirectory) -> Facts:
    base = run.manifest.base.model_dump(mode="json", exclude_unset=True)
    return {**base, "files": f"{len(base.get('files', {}))} files, hashed"}


def _adopted_facts(run: RunDirectory) -> Facts:
    """Return where an adapter from elsewhere comes from; {} for a run that was trained here."""
    adopted = run.manifest.adopted
    if adopted is None:
        return {}
    facts: Facts = {**adopted.model_dump(mode="json"), "files": f"{len(adopted.files)} files, hashed"}
    return {name: value for name, value in facts.items() if value not in ([], {})}


def _data_facts(run: RunDirectory) -> Facts:
    """Return split -> `train.jsonl (2400 rows)`; an entry that is no list of sources stays as it is."""
    return {name: _format_sources(sources) for name, sources in run.manifest.data.items()}


def _format_sources(sources: Any) -> Any:
    if not isinstance(sources, list) or not all(isinstance(source, Mapping) for source in sources):
        return sources
    return ", ".join(map(_format_source, sources))


def _format_source(source: Mapping[str, Any]) -> str:
    count = source.get("rows")
    return f"{source.get('path') or source.get('dataset')} ({count} row{'' if count == 1 else 's'})"


def _stage_facts(run: RunDirectory) -> Facts:
    """Return a section for each stage; without the reference if that is missing or damaged."""
    stages = run.manifest.stages.model_dump(mode="json", exclude_unset=True)
    with suppress(RunDirectoryError):
        stages["reference"] = store.summary(run).model_dump(mode="json", exclude_unset=True)
    return {f"stage: {name}": stage for name, stage in stages.items()}


def _artifact_facts(run: RunDirectory) -> Facts:
    """Return file -> bytes, and the headline of its validation."""
    models = [path for path in sorted(run.artifacts.glob("*")) if is_model(path)]
    return {path.name: {"bytes": _size_on_disk(path), **validation_facts(path)} for path in models}


def _size_on_disk(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


_INPUTS: Mapping[str, Callable[[RunDirectory], Facts]] = {
    "run": _run_facts,
    "base": _base_facts,
    "adopted": _adopted_facts,
    "data": _data_facts,
    "template options": lambda run: run.manifest.template_options,
    "adapter": lambda run: run.manifest.config.get("adapter", {}),
    "quantization": lambda run: run.manifest.config.get("quantization", {}),
    "training": lambda run: run.manifest.config.get("training", {}),
}
_RESULTS: Mapping[str, Callable[[RunDirectory], Facts]] = {
    "gate": lambda run: {key: limit for key, limit in run.manifest.config.get("gate", {}).items() if limit is not None},
    "device": lambda run: dict(run.manifest.device),
    "versions": lambda run: dict(run.manifest.versions),
    "artifacts": _artifact_facts,
}
