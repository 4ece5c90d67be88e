"""The facts of whatever a path holds: the table of readers, one for each format of a model, and one for runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from edgetune.errors import RunDirectoryError
from edgetune.inspect import gguf, onnx, run
from edgetune.inspect.facts import Facts
from edgetune.runs.directory import RunDirectory
from edgetune.runs.status import RunStatus
from edgetune.runtime.artifacts import artifact_format

READERS: Mapping[str, Callable[[Path, bool], Facts]] = {"gguf": gguf.describe, "onnx": onnx.describe}


def describe(path: Path, *, all_tensors: bool = False) -> Facts:
    """Return section -> fact -> value of a model file, an ONNX folder or a run directory.

    Raises:
        ArtifactError: If a model is damaged.
        RunDirectoryError: If the path is neither a model nor a run.
    """
    reader = READERS.get(artifact_format(path) or "")
    if reader:
        return reader(path, all_tensors)
    found = RunDirectory(path)
    if found.status is RunStatus.FOREIGN and any(path.glob("*.safetensors")):
        raise RunDirectoryError(
            f"{path} is a model directory for transformers, which inspect does not describe",
            f"Give a GGUF file, an ONNX folder or a run, or look at {path / 'config.json'}",
        )
    started = found.status in (RunStatus.UNFINISHED, RunStatus.RUNNING) and found.manifest_file.is_file()
    return run.describe(found if started else RunDirectory.open(path))
