"""How the tests of this folder call edgetune."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests import cli_runner

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


def edgetune(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process."""
    result = cli_runner.edgetune(*arguments)
    return subprocess.CompletedProcess(result.args, result.returncode, result.stdout.decode(), result.stderr.decode())


def edgetune_process(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, as a user would."""
    result = cli_runner.edgetune_process(*arguments, stdin=b"", **environment)
    return subprocess.CompletedProcess(result.args, result.returncode, result.stdout.decode(), result.stderr.decode())


def short_run(path: Path) -> list[str]:
    """Arguments of a training that takes seconds."""
    settings = [part for key, value in SHORT.items() for part in ("--set", f"{key}={value}")]
    return ["train", str(CONFIG), "-o", str(path), *settings]
