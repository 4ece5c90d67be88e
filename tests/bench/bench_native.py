"""edgetune_native beside what it replaces, in one process, interleaved, median of seven.

    python -m tests.bench.bench_native [TYPE ...]

Quantizing: our call with one thread and with all, against one call of ggml_quantize_chunk. Comparing: against the
same formulas in float64 numpy.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

import edgetune_native as native
from edgetune_native import _twin
from edgetune_native.face import Face
from tests.native import ggml

ROUNDS = 7
TYPES = ("q8_0", "q4_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs")


def medians(*calls: Callable[[], object]) -> list[float]:
    """Seconds of each call; the calls take turns, so that a slow moment of the machine hits all of them."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, column in zip(calls, times, strict=True):
            begin = time.perf_counter()
            call()
            column.append(time.perf_counter() - begin)
    return [statistics.median(column) for column in times]


def bench_quantize(name: str, rows: int = 512, k: int = 4096) -> None:
    """Print M weights/s of one type."""
    data = np.random.default_rng(0).standard_normal((rows, k)).astype(np.float32)
    brain = (data.view(np.uint32) >> 16).astype(np.uint16)
    seconds = medians(
        lambda: ggml.quantize(data, name),
        lambda: native.quantize(data, name, threads=1),
        lambda: native.quantize(data, name),
        lambda: native.quantize(brain, name),
    )
    theirs, one, all_cores, from_bf16 = (data.size / second / 1e6 for second in seconds)
    print(f"{name:8} {theirs:9.1f} {one:9.1f} {all_cores:9.1f} {from_bf16:9.1f}   x{all_cores / theirs:.2f}")


def bench_compare(n: int = 64, v: int = 151_936) -> None:
    """Print GB/s of logits read."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((n, v)).astype(np.float32)
    b = a + np.float32(0.1) * rng.standard_normal((n, v)).astype(np.float32)
    ids = np.zeros(n, np.int64)
    twin = Face(_twin)
    seconds = medians(
        lambda: twin.compare(a, b, ids),
        lambda: native.compare(a, b, ids, threads=1),
        lambda: native.compare(a, b, ids),
    )
    numpy_rate, one, all_cores = ((a.nbytes + b.nbytes) / second / 1e9 for second in seconds)
    print(f"\ncompare [{n}, {v}], GB/s: numpy {numpy_rate:.2f}, one thread {one:.2f}, all {all_cores:.2f}", end="")
    print(f"   x{all_cores / numpy_rate:.1f}")


def main() -> None:
    """Print the tables."""
    print(f"{native.cpu().isa}: {native.cpu().reason}; libggml {native.ggml_library().version}")
    print(f"{'M weights/s':8} {'ggml':>6} {'1 thread':>9} {'all':>9} {'all, bf16':>9}")
    for name in sys.argv[1:] or TYPES:
        bench_quantize(name)
    bench_compare()


if __name__ == "__main__":
    main()
