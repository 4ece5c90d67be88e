"""Commands that the benchmarks run to their end: what they took and what they left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """What one side took."""

    seconds: float
    processor: float
    """Seconds of all cores, which other work on the machine changes less."""
    peak: float
    """Bytes."""
    written: int


def run(command: Sequence[str]) -> Cost:
    """What a child process takes; nothing is known of what it writes. The last words of one that fails are shown."""
    begin = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert child.stderr is not None
    errors = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{' '.join(command[:3])} failed:\n{errors.decode()[-2000:]}")
    return Cost(time.perf_counter() - begin, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024.0, 0)


def size(path: Path) -> int:
    """Bytes of a file, or of all files of a directory."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
