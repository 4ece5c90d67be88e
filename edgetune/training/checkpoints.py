"""Checkpoints for --resume: which ones are complete, how long training took until then, and keeping the last few.

A kill can come while a checkpoint is being written. Therefore a checkpoint counts only once its marker file exists. The
marker is written last, and an older checkpoint is deleted only after that.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

MARKER = "complete"
ELAPSED = "elapsed.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step after which a checkpoint was written, or -1 for another directory."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def write_elapsed(checkpoint: Path, seconds: float) -> None:
    """Store the training time up to a checkpoint."""
    (checkpoint / ELAPSED).write_text(json.dumps({"seconds": round(seconds, 3)}) + "\n", encoding="utf-8")


def read_elapsed(checkpoint: Path | None) -> float:
    """Return the training time up to a checkpoint in seconds; 0 without one, or for one of an earlier edgetune."""
    try:
        return float(json.loads((checkpoint / ELAPSED).read_text(encoding="utf-8"))["seconds"]) if checkpoint else 0.0
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def mark_complete(checkpoint: Path) -> None:
    """Declare a checkpoint completely written."""
    (checkpoint / MARKER).touch()


def list_complete(directory: Path) -> list[Path]:
    """List the complete checkpoints, oldest first."""
    found = [path.parent for path in directory.glob(f"checkpoint-*/{MARKER}")]
    return sorted((path for path in found if step_of(path) >= 0), key=step_of)


def latest_complete(directory: Path) -> Path | None:
    """Return the newest complete checkpoint."""
    return next(reversed(list_complete(directory)), None)


def prune(directory: Path, keep: int) -> None:
    """Delete all but the last `keep` complete checkpoints."""
    for path in list_complete(directory)[:-keep]:
        (path / MARKER).unlink()  # first, so that a kill half way leaves an incomplete checkpoint, not a damaged one
        shutil.rmtree(path)


def delete_incomplete(directory: Path) -> None:
    """Delete checkpoints that a kill left incomplete."""
    for path in directory.glob("checkpoint-*"):
        if path.is_dir() and not (path / MARKER).is_file():
            shutil.rmtree(path)
