"""Compare logits: the kernel, NumPy and the memory bandwidth, in one process, interleaved, median of seven.

    python -m tests.bench.bench_logits

numpy: the NumPy reference backend, the definitions in float64 with the same outputs. memory: reading the same bytes,
row by row, on as many threads, with almost no work (`numpy.max` of integers: one vector instruction per 64 bytes).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from os import sched_getaffinity
from typing import Any

import numpy as np
from numpy.typing import NDArray

import edgetune_native as native
from tests.bench.timing import medians
from tests.native.backends import REFERENCE

CASES = {  # distance of the two models' logits (standard deviation), element type, how much of a row is -inf
    "close, f32": (0.1, np.float32, 0.0),
    "far, f32": (1.0, np.float32, 0.0),
    "close, f32, half -inf": (0.1, np.float32, 0.5),
    "close, f16": (0.1, np.float16, 0.0),
}


def reader(arrays: tuple[NDArray[Any], ...], threads: int, pool: ThreadPoolExecutor) -> Callable[[], object]:
    """A call that reads every byte, each thread its share of the rows, as int32."""

    def read(part: int) -> int:
        return max(int(row.max()) for array in words for row in array[part::threads])

    words = [array.view(np.int32) for array in arrays]
    return lambda: list(pool.map(read, range(threads)))


def bench_case(name: str, n: int, v: int, pool: ThreadPoolExecutor) -> None:
    """Print one row."""
    distance, dtype, masked = CASES[name]
    rng = np.random.default_rng(0)
    a = 3 * rng.standard_normal((n, v), np.float32)
    b = a + np.float32(distance) * rng.standard_normal((n, v), np.float32)
    if masked:
        a[:, rng.random(v) < masked] = -np.inf
    rows = a.astype(dtype), b.astype(dtype)
    ids, cores = np.zeros(n, np.int64), len(sched_getaffinity(0))
    few = max(1, n // 8)  # numpy needs seconds for all
    slow, one, every, read_one, read_every = medians(
        lambda: REFERENCE.compare(rows[0][:few], rows[1][:few], ids[:few]),
        lambda: native.compare(*rows, ids, threads=1),
        lambda: native.compare(*rows, ids),
        reader(rows, 1, pool),
        reader(rows, cores, pool),
    )
    size = rows[0].nbytes + rows[1].nbytes
    rates = [size * few / n / slow, *(size / second for second in (one, every, read_one, read_every))]
    columns = " ".join(f"{rate / 1e9:9.2f}" for rate in rates)
    print(
        f"{name:22} {columns}   x{rates[1] / rates[0]:.1f} numpy, {read_one / one:.0%} of memory with one thread; "
        f"x{rates[2] / rates[0]:.1f}, {read_every / every:.0%} with {cores}"
    )


def bench_compare(n: int = 64, v: int = 151_936) -> None:
    """Print GB/s of logits read."""
    print(f"\ncompare [{n}, {v}], {native.cpu().isa}, GB/s")
    print(f"{'':22} {'numpy':>9} {'1 thread':>9} {'all':>9} {'memory, 1':>9} {'all':>9}")
    with ThreadPoolExecutor() as pool:
        for name in CASES:
            bench_case(name, n, v, pool)


if __name__ == "__main__":
    bench_compare()
