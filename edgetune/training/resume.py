"""What a run directory holds already, and whether that allows what is asked for."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from edgetune import console
from edgetune.config import Config
from edgetune.errors import RunDirectoryError
from edgetune.planning.prepare import PreparedRun
from edgetune.planning.tokenizer_files import changed_tokenizer_files
from edgetune.reference.writer import stopped_directory
from edgetune.runs import lock
from edgetune.runs.directory import RunDirectory
from edgetune.runs.manifest import RunManifest

# What may differ between a run and its resumption: nothing that has a say in the weights.
_FREE_SECTIONS = ("name", "reference", "export", "gate")
_FREE_TRAINING = ("eval_steps", "save_steps", "keep_checkpoints", "logging_steps")

_SPLITS = {"train": "the rows of data.train", "validation": "the held-out rows", "test": "the rows of data.test"}


class TrainingInterrupted(Exception):
    """Training stopped at a checkpoint, on request."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")


def check_run_directory(run: RunDirectory, *, resume: bool, overwrite: bool) -> None:
    """RunDirectoryError when the directory's state does not allow what was asked for."""
    lock.refuse_if_written(run.path)
    if overwrite or (resume and run.manifest_file.is_file()):
        return
    if run.is_finished:
        raise RunDirectoryError(
            f"{run.path} holds a finished run", "Write elsewhere with -o, or replace it with --overwrite."
        )
    if run.unfinished_file.is_file():
        raise RunDirectoryError(
            f"{run.path} holds an unfinished run", "Go on with --resume, or start anew with --overwrite."
        )
    if run.path.exists() and (not run.path.is_dir() or {each.name for each in run.path.iterdir()} - {lock.FILE}):
        raise RunDirectoryError(f"{run.path} exists and is not a run directory", "Write elsewhere with -o.")


def changed_options(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Dotted names of the options that have a say in the weights and differ."""
    found = []
    for section in sorted(stored.keys() | wanted.keys()):
        if section in _FREE_SECTIONS or stored.get(section) == wanted.get(section):
            continue
        before, after = stored.get(section), wanted.get(section)
        if not isinstance(before, Mapping) or not isinstance(after, Mapping):
            found.append(section)
            continue
        free = _FREE_TRAINING if section == "training" else ()
        keys = sorted(before.keys() | after.keys())
        found += [f"{section}.{key}" for key in keys if key not in free and before.get(key) != after.get(key)]
    return found


def can_resume(
    run: RunDirectory,
    config: Config,
    base: Mapping[str, Any],
    data: Mapping[str, Any],
    *,
    resume: bool,
    overwrite: bool,
) -> bool:
    """Whether to take up the unfinished run that is there, rather than to start anew.

    With `resume` alone, inputs that have changed since the run was started are a RunDirectoryError; with `overwrite`
    too, they are the reason to start anew, which is what a pipeline wants.
    """
    if not resume or run.is_finished or not run.unfinished_file.is_file():
        return False
    changed = changed_inputs(run.manifest, config, base, data)
    if changed and not overwrite:
        raise RunDirectoryError(
            f"the run in {run.path} was started with other inputs: {', '.join(changed)} differ",
            "Restore them, or start anew with --overwrite.",
        )
    if changed:
        console.note(f"starting anew, since {', '.join(changed)} changed after the run in {run.path} was started")
    return not changed


def is_up_to_date(run: RunDirectory, plan: PreparedRun, base: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Whether a finished run is what training with `plan` would give; if not, says what differs.

    RunDirectoryError in place of that without `overwrite`, since the run would be replaced.
    """
    changed = changed_inputs(run.manifest, plan.config, base, plan.data_identity)
    files = changed_tokenizer_files(plan.base.path, plan.template.source, run.tokenizer)
    changed += [f"the base's {name}" for name in files]
    words = ", ".join(dict.fromkeys(changed))
    if changed and not overwrite:
        raise RunDirectoryError(
            f"{run.path} holds a finished run with other inputs: {words} differ",
            "Write elsewhere with -o, or replace it with --overwrite.",
        )
    if changed:
        console.note(f"replacing the finished run in {run.path}: trained anew, since {words} changed after it")
    return not changed


def is_reference_up_to_date(run: RunDirectory, config: Config) -> bool:
    """Whether the reference of a finished run was captured as `config` wants it; if not, says so."""
    same = run.manifest.config.get("reference") == config.reference.model_dump(mode="json")
    if not same:
        console.note(f"the run in {run.path} keeps its adapter; its reference is captured anew: other options")
    return bool(same)


def adopt_free_sections(run: RunDirectory, config: Config) -> None:
    """Give a finished run the sections of `config` that had no say in training, and say so."""
    before, wanted = run.manifest.config, config.model_dump(mode="json")
    changed = [section for section in _FREE_SECTIONS if before.get(section) != wanted[section]]
    taken = f"; {', '.join(changed)} taken into run.json" if changed else ""
    console.note(f"the run in {run.path} has finished already; there is nothing to resume{taken}")
    run.adopt(**{section: wanted[section] for section in _FREE_SECTIONS})


def changed_inputs(
    manifest: RunManifest, config: Config, base: Mapping[str, Any], data: Mapping[str, Any]
) -> list[str]:
    """What differs of that which has a say in the weights: options, files of the base, training rows."""
    changed = changed_options(manifest.config, config.model_dump(mode="json"))
    before, now = manifest.base.files, base["files"]
    changed += [
        f"the base's {name}" for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)
    ]
    return changed + changed_rows(manifest.data, data)


def changed_rows(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The splits whose rows differ between two of the manifest's `data`; where a file lies is of no matter.

    Compared are the rows as they were encoded, or, where one of the two does not know them, the hashes of the sources.
    """
    found = []
    for split, words in _SPLITS.items():
        same_sources = _contents(before.get(split)) == _contents(now.get(split))
        digests = [data.get("rows", {}).get(split) for data in (before, now)]
        if None in digests:
            found += [] if same_sources else [words]
        elif digests[0] != digests[1]:
            found.append(f"{words} as tokens (by tokenizer or template)" if same_sources else words)
    return found


def _contents(sources: Any) -> list[dict[str, Any]]:
    """Sources without their paths; none of a split that is unknown."""
    return [{key: value for key, value in source.items() if key != "path"} for source in sources or []]


def remove_run_files(run: RunDirectory) -> None:
    """Remove an earlier run. Its manifest goes first, so that what a kill leaves behind is not taken for a run."""
    for file in (run.finished_file, run.unfinished_file):
        file.unlink(missing_ok=True)
    shutil.rmtree(stopped_directory(run.reference), ignore_errors=True)
    for part in (run.adapter, run.tokenizer, run.reference, run.checkpoints, run.logs):
        shutil.rmtree(part, ignore_errors=True)
