"""Run calls on several threads with the results in order and a bounded number of them in memory.

Almost all of the work releases the interpreter lock: mapped reads, merging, quantization, hashing, writing. Each thread
carries one block through all of its stages, so that no stage waits for another.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_MAX_WORKERS = 4  # blocks processed at once; further threads share the work on a block
_AHEAD = 3  # blocks that may wait for a slower one before them; with one, an export took 6 to 10 % longer


def run_in_order(calls: Iterable[Callable[[], T]], workers: int) -> Iterator[T]:
    """Yield the results of the calls in order; an error is raised in place of its result.

    At most `workers` + 3 calls are running or finished and not yet consumed. Leaving early waits for the running calls.
    """
    waiting: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(workers, "edgetune-block")
    try:
        for call in calls:
            waiting.append(pool.submit(call))
            if len(waiting) >= workers + _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def split_threads(threads: int) -> tuple[int, int]:
    """Return the number of blocks to process at once, and the threads for each. 0 `threads` means all cores."""
    total = threads or _usable_cores()
    workers = min(total, _MAX_WORKERS)
    return workers, -(-total // workers)


def _usable_cores() -> int:
    """Return the cores that this process may use; containers and taskset allow fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
