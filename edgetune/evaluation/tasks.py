"""Find and load tasks of lm-evaluation-harness, with an error for each way in which that fails."""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import importlib.util
import logging
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgetune.errors import ConfigError, DataError, EnvironmentProblem

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

INSTALL = "pip install 'edgetune[evaluate]'"
_NEAREST = 4
_FILES = ("json", "csv", "parquet", "text", "arrow")
"""Data sets that the library `datasets` makes of files: values of `dataset_path`."""


def require_harness() -> None:
    """Raise EnvironmentProblem unless lm-evaluation-harness is installed; silence its bars and messages."""
    if importlib.util.find_spec("lm_eval") is None:
        raise EnvironmentProblem(
            "lm-evaluation-harness is not installed (the extra `evaluate`)", f"Install it with `{INSTALL}`"
        )
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is first imported
    for name in ("lm_eval", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


def harness_version() -> str:
    """Return the version of lm-evaluation-harness."""
    return importlib.metadata.version("lm_eval")


def load_tasks(names: Sequence[str], include_paths: Sequence[Path]) -> dict[str, Any]:
    """Load tasks, groups and tags with their data sets.

    Args:
        names: Names of the harness, or of the YAML files in `include_paths`.
        include_paths: Folders with tasks of the user's own. `data_files` in them may be relative to the YAML file.

    Returns:
        What `TaskManager.load` returns: {"tasks": {name: Task}, "groups": {name: Group}, ...}.

    Raises:
        ConfigError: A name is unknown, or a folder has no task.
        DataError: A task cannot be loaded: its YAML is wrong, or its data set is not there and not reachable.
        EnvironmentProblem: A task needs a Python package that is not installed.
    """
    manager = _manager(names, include_paths)
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, _NEAREST, 0.5)
        hint = f"The nearest names are {', '.join(near)}" if near else "Look at `lm-eval ls tasks`"
        raise ConfigError(f"there is no task {unknown[0]!r}", hint)
    _resolve_data_files(manager, include_paths)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in dict.fromkeys(names):
        with _explained(name), _quiet_datasets():
            found = manager.load([name])
        for key, entries in found.items():
            loaded[key].update(entries)
    return loaded


def _manager(names: Sequence[str], include_paths: Sequence[Path]) -> TaskManager:
    """Return the index of all tasks; of the included ones alone if these suffice, since the others take seconds."""
    from lm_eval.tasks import TaskManager

    for folder in include_paths:
        _check_folder(folder)
    if include_paths:
        own = TaskManager(include_path=list(include_paths), include_defaults=False)
        if all(name in own.task_index for name in names):
            return own
    return TaskManager(include_path=list(include_paths) or None)


def _check_folder(folder: Path) -> None:
    """Raise an error for a folder without tasks, or with a YAML file that the harness would pass over in silence."""
    from lm_eval.tasks._yaml_loader import load_yaml

    files = sorted(folder.glob("**/*.yaml")) if folder.is_dir() else []
    if not files:
        what = "has no YAML file (*.yaml)" if folder.is_dir() else "is no folder"
        raise ConfigError(f"--include-path {folder} {what}", "Give a folder with tasks of lm-evaluation-harness")
    for file in files:
        try:
            content = load_yaml(file, resolve_func=False)
        except Exception as error:  # noqa: BLE001 - whatever the YAML reader and its constructors raise
            reason = " ".join(str(error).split())
            raise DataError(f"{file} is not a task of lm-evaluation-harness: {reason}", "Correct the file") from None
        if not isinstance(content, dict):
            raise DataError(f"{file} is not a task of lm-evaluation-harness: it is no mapping", "Correct the file")


def _resolve_data_files(manager: TaskManager, include_paths: Sequence[Path]) -> None:
    """Let `data_files` of included tasks be relative to their YAML file, where they are not relative to here."""
    from lm_eval.tasks._yaml_loader import load_yaml

    folders = [folder.resolve() for folder in include_paths]
    for name, entry in manager.task_index.items():
        if not entry.cfg or entry.yaml_path is None:
            continue
        path, options = entry.yaml_path.resolve(), entry.cfg.get("dataset_kwargs")
        if not any(folder in path.parents for folder in folders) or entry.cfg.get("dataset_path") not in _FILES:
            continue
        files = options.get("data_files") if isinstance(options, dict) else None
        found = _beside(files, path.parent)
        if found != files:
            with _explained(name):
                entry.cfg = load_yaml(path, resolve_func=True)
            entry.cfg["dataset_kwargs"] = {**options, "data_files": found}
            entry.yaml_path = None  # the harness reads the file again where it has one


def _beside(value: Any, folder: Path) -> Any:
    """Return the paths in `data_files` (a text, a list, or either by split), resolved."""
    if isinstance(value, dict):
        return {key: _beside(each, folder) for key, each in value.items()}
    if isinstance(value, list):
        return [_beside(each, folder) for each in value]
    if not isinstance(value, str) or Path(value).exists() or not (folder / value).exists():
        return value
    return str(folder / value)


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what the harness and `datasets` raise into one sentence."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise EnvironmentProblem(
            f"the task {name!r} needs the Python package {error.name}, which is not installed",
            f"Install it with `pip install {error.name}`",
        ) from None
    except Exception as error:  # noqa: BLE001 - of the harness, of `datasets`, or of code beside a YAML file
        if _is_network(error):
            raise DataError(
                f"the data set of the task {name!r} is not on this machine, and the hub cannot be reached",
                "Load it once where there is a network, or use a task whose data are files (--include-path)",
            ) from None
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"the task {name!r} cannot be loaded: {reason}", "Correct its YAML file or its data") from None


def _is_network(error: BaseException | None) -> bool:
    """Whether the cause of an error is that a server cannot be reached, or must not be."""
    while error is not None:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if kinds & {"ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "TransportError", "Timeout"}:
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    import datasets

    was_enabled = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was_enabled:
            datasets.enable_progress_bars()


def seed(tasks: Sequence[Any]) -> None:
    """Set the seeds as `lm_eval` does, so that each model is given the same few-shot examples."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    for task in tasks:
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def set_num_fewshot(tasks: Sequence[Any], count: int | None) -> list[str]:
    """Set the number of examples; return the names of tasks that state 0 themselves and keep it, as in `lm_eval`."""
    kept = []
    for task in tasks:
        stated = task.get_config("num_fewshot")
        if count is not None and stated == 0:
            kept.append(task.task_name)
        elif count is not None or stated is None:
            task.set_config(key="num_fewshot", value=count or 0)
    return kept


def refuse_missing_examples(tasks: Sequence[Any]) -> None:
    """Raise ConfigError for a task that has fewer documents to take examples from than each of its prompts needs."""
    for task in tasks:
        count, sampler = task.get_config("num_fewshot") or 0, getattr(task, "sampler", None)
        if not count or sampler is None:
            continue
        found = len(sampler.df)
        # a document is no example of itself
        spare = found - (task.fewshot_cfg.split == task.get_config("test_split"))
        if count > spare:
            raise ConfigError(
                f"the task {task.task_name} has {found} documents to take examples from, too few for {count} examples "
                "in each prompt",
                f"Set --num-fewshot to {spare} or less" if spare > 0 else "Leave out --num-fewshot",
            )
