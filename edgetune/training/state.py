"""What a run directory holds already, and whether that allows what is asked for."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from edgetune import console
from edgetune.config import Config
from edgetune.errors import RunDirectoryError
from edgetune.reference_writer import stopped_directory
from edgetune.run_directory import RunDirectory

# What may differ between a run and its resumption: nothing that has a say in the weights.
_FREE_SECTIONS = ("name", "reference", "export", "gate")
_FREE_TRAINING = ("eval_steps", "save_steps", "keep_checkpoints", "logging_steps")


class Stopped(Exception):
    """Training stopped at a checkpoint, on request."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")


def check_state(run: RunDirectory, *, resume: bool, overwrite: bool) -> None:
    """RunDirectoryError when the directory's state does not allow what was asked for."""
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
    if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
        raise RunDirectoryError(f"{run.path} exists and is not a run directory", "Write elsewhere with -o.")


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
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


def goes_on(
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


def check_same_options(run: RunDirectory, config: Config) -> None:
    """RunDirectoryError when a finished run was trained with other options than those that are asked for now."""
    changed = differences(run.manifest.get("config", {}), config.model_dump(mode="json"))
    if changed:
        raise RunDirectoryError(
            f"{run.path} holds a finished run with other inputs: {', '.join(changed)} differ",
            "Write elsewhere with -o, or replace it with --overwrite.",
        )


def changed_inputs(
    manifest: Mapping[str, Any], config: Config, base: Mapping[str, Any], data: Mapping[str, Any]
) -> list[str]:
    """What differs of that which has a say in the weights: options, files of the base, training rows."""
    changed = differences(manifest.get("config", {}), config.model_dump(mode="json"))
    before, now = manifest.get("base", {}).get("files", {}), base["files"]
    changed += [
        f"the base's {name}" for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)
    ]
    if manifest.get("data", {}).get("train") != data["train"]:
        changed.append("the rows of data.train")
    return changed


def clear(run: RunDirectory) -> None:
    """Remove an earlier run. Its manifest goes first, so that what a kill leaves behind is not taken for a run."""
    for file in (run.finished_file, run.unfinished_file):
        file.unlink(missing_ok=True)
    shutil.rmtree(stopped_directory(run.reference), ignore_errors=True)
    for part in (run.adapter, run.tokenizer, run.reference, run.checkpoints, run.logs):
        shutil.rmtree(part, ignore_errors=True)
