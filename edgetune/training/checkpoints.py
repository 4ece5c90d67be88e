"""Checkpoints for --resume: which ones are complete, and keeping only the last few.

A kill can come while a checkpoint is being written, so one counts only once its marker file is there; the marker is
written last, and an older checkpoint is deleted only after that.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

MARKER = "complete"
_NAME = re.compile(r"checkpoint-(\d+)")


def step_of(checkpoint: Path) -> int:
    """The optimiser step after which a checkpoint was written."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def mark_complete(checkpoint: Path) -> None:
    """Declare a checkpoint written."""
    (checkpoint / MARKER).touch()


def list_complete(directory: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    found = [path.parent for path in directory.glob(f"checkpoint-*/{MARKER}")]
    return sorted((path for path in found if step_of(path) >= 0), key=step_of)


def latest_complete(directory: Path) -> Path | None:
    """The newest complete checkpoint."""
    return next(reversed(list_complete(directory)), None)


def prune(directory: Path, keep: int) -> None:
    """Delete all but the last `keep` complete checkpoints."""
    for path in list_complete(directory)[:-keep]:
        (path / MARKER).unlink()  # first, so that a kill half way leaves an incomplete one and not a broken one
        shutil.rmtree(path)


def delete_incomplete(directory: Path) -> None:
    """Delete what a kill left half-written."""
    for path in directory.glob("checkpoint-*"):
        if path.is_dir() and not (path / MARKER).is_file():
            shutil.rmtree(path)
