"""Files and runs that the command tests share, and the command line as a user meets it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

COMMAND = [sys.executable, "-m", "edgetune.cli"]


def edgetune(*arguments: str | Path, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """In a process of its own; nothing is decoded, for what reaches a pipe is what counts."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def sentence(result: subprocess.CompletedProcess[bytes]) -> str:
    """What an error says, after checking that it is no traceback and that nothing is on standard output."""
    said = result.stderr.decode()
    assert "Traceback" not in said
    assert "error:" in said or "Usage:" in said
    assert result.stdout == b""
    return said
