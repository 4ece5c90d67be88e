"""How long `edgetune --help` takes, beside the bare interpreter: `make bench-startup`.

The two are started in turn; the median of each and of the differences is printed, in milliseconds.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

ROUNDS = 15
BARE = [sys.executable, "-c", "pass"]
HELP = [sys.executable, "-m", "edgetune.cli", "--help"]


def milliseconds(command: list[str]) -> float:
    """Wall time of one run of a command."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    """Print the table."""
    pairs = [(milliseconds(BARE), milliseconds(HELP)) for _ in range(ROUNDS)]
    bare, help_ = (statistics.median(column) for column in zip(*pairs, strict=True))
    added = statistics.median(after - before for before, after in pairs)
    print(f"python -c pass   {bare:6.0f} ms\nedgetune --help  {help_:6.0f} ms\ndifference       {added:6.0f} ms")


if __name__ == "__main__":
    main()
