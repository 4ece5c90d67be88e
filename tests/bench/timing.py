"""How the benchmarks measure: calls that take turns in one process, and the median of seven."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

ROUNDS = 7
Call = Callable[[], object]


def medians(*calls: Call) -> list[float]:
    """Seconds of each call; the calls take turns, so that a slow moment of the machine hits all of them."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, column in zip(calls, times, strict=True):
            begin = time.perf_counter()
            call()
            column.append(time.perf_counter() - begin)
    return [statistics.median(column) for column in times]
