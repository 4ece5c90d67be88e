"""What a run directory already holds, and whether a training may resume, keep or replace it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from edgetune import console
from edgetune.config import Config, TemplateConfig
from edgetune.errors import RunDirectoryError
from edgetune.objectives import Sft
from edgetune.planning.prepare import PreparedRun
from edgetune.planning.tokenizer_files import changed_tokenizer_files
from edgetune.reference.partial import stopped_directory
from edgetune.runs import lock
from edgetune.runs.directory import RunDirectory
from edgetune.runs.manifest import RunManifest
from edgetune.runs.status import RunStatus

# Options that do not affect the weights: they may differ between a run and its resumption.
_FREE_SECTIONS = ("name", "reference", "export", "gate")
_FREE_KEYS = {
    "training": ("eval_steps", "save_steps", "keep_checkpoints", "logging_steps", "gradient_checkpointing"),
    "quantization": ("resident",),
    # the hashes of the rows show the effect of on_bad_row, columns and roles
    "data": ("on_bad_row", "columns", "roles", "test", "answer", "choices"),
}

_BY_CONTENT = ("base", "tokenizer", "data.train", "data.validation")
"""Options that name inputs whose contents are compared instead: a checkout may be moved between two starts."""

_EXISTING = {
    RunStatus.FINISHED: ("holds a finished run", "Write elsewhere with -o, or replace the run with --overwrite"),
    RunStatus.UNFINISHED: ("holds an unfinished run", "Resume it with --resume, or start over with --overwrite"),
    RunStatus.RUNNING: (
        "is being written by another process",
        "Wait until it has finished, or write elsewhere with -o",
    ),
    RunStatus.FOREIGN: ("exists and is not a run directory", "Write elsewhere with -o"),
}
_SPLITS = {"train": "the rows of data.train", "validation": "the held-out rows"}


class TrainingInterrupted(Exception):
    """Training stopped at a checkpoint, after Ctrl-C."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")


def check_run_directory(run: RunDirectory, *, resume: bool, overwrite: bool) -> None:
    """Raise RunDirectoryError if another process writes there, or if an existing run may not be replaced."""
    lock.refuse_if_written(run.path)
    error = existing_run_error(run, resume=resume, overwrite=overwrite)
    if error:
        raise error


def existing_run_error(run: RunDirectory, *, resume: bool, overwrite: bool) -> RunDirectoryError | None:
    """Return the error for a directory that exists and may be neither resumed nor replaced, if it is one."""
    status = run.status
    if overwrite or status is RunStatus.ABSENT or (resume and run.manifest_file.is_file()):
        return None
    what, hint = _EXISTING[status]
    return RunDirectoryError(f"{run.path} {what}", hint)


def can_resume(run: RunDirectory, prepared: PreparedRun, *, resume: bool, overwrite: bool) -> bool:
    """Whether to resume the unfinished run that exists, instead of starting over.

    Inputs that have changed since the run was started raise RunDirectoryError. With `overwrite` they are the reason to
    start over, as a pipeline needs it.
    """
    if not resume or run.is_finished or not run.unfinished_file.is_file():
        return False
    changed = ", ".join(changed_inputs(run.manifest, prepared))
    if changed and not overwrite:
        raise RunDirectoryError(
            f"the run in {run.path} was started with other inputs: {changed} differ",
            "Restore them, or start over with --overwrite",
        )
    if changed:
        console.note(f"starting over, because {changed} changed after the run in {run.path} was started")
    return not changed


def is_up_to_date(run: RunDirectory, prepared: PreparedRun, *, overwrite: bool) -> bool:
    """Whether a finished run has the inputs of `prepared`, so that training again would give the same.

    If it has not, print what differs. Without `overwrite` raise RunDirectoryError instead, since the run would be
    replaced.
    """
    changed = changed_inputs(run.manifest, prepared)
    files = changed_tokenizer_files(prepared.base.directory, prepared.template, run.tokenizer)
    words = ", ".join(dict.fromkeys([*changed, *(f"the base's {name}" for name in files)]))
    if words and not overwrite:
        raise RunDirectoryError(
            f"{run.path} holds a finished run with other inputs: {words} differ",
            "Write elsewhere with -o, or replace the run with --overwrite",
        )
    if words:
        console.note(f"training again: replacing the finished run in {run.path}, because {words} changed after it")
    return not words


def is_reference_up_to_date(run: RunDirectory, prepared: PreparedRun) -> bool:
    """Whether the reference of a finished run was captured with these options and test rows; if not, print that."""
    config, before = prepared.config.model_dump(mode="json"), run.manifest.config
    changed = [] if before.get("reference") == config["reference"] else ["its options"]
    if _task_inputs(before, run.manifest.data) != _task_inputs(config, prepared.data_identity):
        changed.append("the test rows or their answers")
    if changed:
        console.note(
            f"the run in {run.path} keeps its adapter; recapturing the reference: {' and '.join(changed)} changed"
        )
    return not changed


def _task_inputs(config: Mapping[str, Any], data: Mapping[str, Any]) -> Any:
    """Return what the task part of a reference depends on; None without test rows."""
    rows = _without_paths(data.get("test"))
    section = config.get("data", {})
    return (rows, section.get("answer", "exact"), section.get("choices", [])) if rows else None


def adopt_free_sections(run: RunDirectory, config: Config) -> None:
    """Store what does not affect training of `config` in a finished run, and print which sections have changed."""
    before, wanted = run.manifest.config, config.model_dump(mode="json")
    adopted = {section: wanted[section] for section in _FREE_SECTIONS}
    for section, keys in _FREE_KEYS.items():
        adopted[section] = {**before.get(section, {}), **{key: wanted[section][key] for key in keys}}
    changed = [section for section, value in adopted.items() if before.get(section) != value]
    updated = f"; {', '.join(changed)} updated in run.json" if changed else ""
    console.note(f"the run in {run.path} has finished already; there is nothing to resume{updated}")
    run.adopt(**adopted)


def changed_inputs(manifest: RunManifest, prepared: PreparedRun) -> list[str]:
    """List what differs of everything that affects the weights: options, files of the base, training rows."""
    before, now = manifest.base.files, prepared.base.identity["files"]
    options = changed_options(manifest.config, prepared.config.model_dump(mode="json"))
    return [
        *(name for name in options if name not in _BY_CONTENT),
        *(f"the base's {name}" for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)),
        *changed_rows(manifest.data, prepared.data_identity),
        *_changed_files(manifest.data, prepared.data_identity),
    ]


def _changed_files(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List the files of the objective that differ: reward functions, or the weights of a teacher."""
    stored, found = (data.get("objective_files", {}) for data in (before, now))
    return [f"the objective's {name}" for name in sorted(stored.keys() | found) if stored.get(name) != found.get(name)]


def changed_options(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """List the dotted names of options that affect the weights and differ."""
    found = []
    for section in sorted(stored.keys() | wanted.keys()):
        before, after = stored.get(section, _default(section)), wanted.get(section)
        if section in _FREE_SECTIONS or before == after:
            continue
        if not isinstance(before, Mapping) or not isinstance(after, Mapping):
            found.append(section)
            continue
        free = _FREE_KEYS.get(section, ())
        keys = sorted(before.keys() | after.keys())
        found += [f"{section}.{key}" for key in keys if key not in free and before.get(key) != after.get(key)]
    return found


def _default(section: str) -> Any:
    """Return the defaults of a section that a run of an older edgetune does not have."""
    return {"template": TemplateConfig().model_dump(mode="json"), "objective": Sft().model_dump(mode="json")}.get(
        section
    )


def changed_rows(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List the splits whose rows differ between two `data` entries of manifests; paths of files do not count.

    The encoded rows are compared; or the hashes of the sources, if one of the manifests has no hash of the rows.
    """
    found = []
    for split, words in _SPLITS.items():
        same_sources = _without_paths(before.get(split)) == _without_paths(now.get(split))
        digests = [data.get("rows", {}).get(split) for data in (before, now)]
        if None in digests:
            found += [] if same_sources else [words]
        elif digests[0] != digests[1]:
            found.append(f"{words} as tokens (by tokenizer or template)" if same_sources else words)
    return found


def _without_paths(sources: Any) -> list[dict[str, Any]]:
    return [{key: value for key, value in source.items() if key != "path"} for source in sources or []]


def remove_run_files(run: RunDirectory) -> None:
    """Remove an earlier run. The manifest goes first, so that the rest of an aborted removal is not taken for a run."""
    for file in (
        run.finished_file,
        run.unfinished_file,
        run.teacher_answers,
        run.score_head,
        run.scores_file,
        run.ngrams,
        run.calibration,
    ):
        file.unlink(missing_ok=True)
    shutil.rmtree(stopped_directory(run.reference), ignore_errors=True)
    for part in (run.adapter, run.tokenizer, run.reference, run.checkpoints, run.logs):
        shutil.rmtree(part, ignore_errors=True)
