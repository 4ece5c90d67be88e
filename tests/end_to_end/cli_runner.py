"""How the tests of this folder call edgetune."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "samples/smart-home/config.yaml"
SHORT = {
    "training.max_steps": "6",
    "training.batch_size": "8",
    "training.save_steps": "3",
    "training.eval_steps": "6",
    "data.max_rows": "64",
    "reference.rows": "6",
    "reference.task_rows": "4",
    "reference.max_new_tokens": "12",
}


def edgetune(
    *arguments: str | Path, env: dict[str, str] | None = None, **options: object
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, as a user would."""
    command = [sys.executable, "-m", "edgetune.cli", *map(str, arguments)]
    environment = {**os.environ, **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, **options)  # type: ignore[call-overload, no-any-return]


def short_run(path: Path) -> list[str]:
    """Arguments of a training that takes seconds."""
    settings = [part for key, value in SHORT.items() for part in ("--set", f"{key}={value}")]
    return ["train", str(CONFIG), "-o", str(path), *settings]
