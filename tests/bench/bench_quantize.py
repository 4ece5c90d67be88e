"""Quantizing to GGUF types: libggml's ggml_quantize_chunk against our kernels.

    python -m tests.bench.bench_quantize [TYPE ...]

One thread each, with and without importance weights, for each instruction set of this machine; then what two threads
give over one, and what rows in bf16 cost over rows in f32.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

import edgetune_native as native
from tests.bench.timing import Call, medians
from tests.native import ggml
from tests.native.backends import native as extension

TYPES = ("q4_k", "q5_k", "q6_k", "q2_k", "q3_k", "iq4_xs", "iq4_nl", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
K = 4096
ROWS, THEIR_ROWS = 2048, 32  # libggml is so slow on some types that it gets fewer rows; the rates are per weight


def instruction_sets() -> Iterator[str]:
    """Those that run here, the best first, without the plain C one."""
    for isa in ("avx512", "avx2", "neon"):
        try:
            extension.use_isa(isa)
        except ValueError:
            continue
        yield isa


def _bench(name: str, weights: NDArray[np.float32] | None) -> None:
    """Print a line of M weights/s of one type."""
    rows = np.random.default_rng(0).standard_normal((ROWS, K)).astype(np.float32)
    brain = (rows.view(np.uint32) >> 16).astype(np.uint16)
    out = np.empty((ROWS, native.row_bytes(name, K)), np.uint8)
    best, *others = instruction_sets()

    def ours(isa: str, source: NDArray[np.float32] | NDArray[np.uint16], threads: int) -> Call:
        def call() -> None:
            extension.use_isa(isa)
            native.quantize(source, name, weights=weights, threads=threads, out=out)

        return call

    seconds = medians(
        lambda: ggml.quantize(rows[:THEIR_ROWS], name, weights),
        ours(best, rows, 1),
        ours(best, rows, 2),
        ours(best, brain, 1),
        *(ours(isa, rows, 1) for isa in others),
    )
    theirs, one, two, from_bf16, *rest = (rows.size / second / 1e6 for second in seconds)
    theirs *= THEIR_ROWS / ROWS
    what = f"{name:8}{'' if weights is None else 'imatrix':9}"
    line = f"{what}{theirs:9.1f} {one:9.1f} x{one / theirs:6.1f} x{two / one:5.2f} {one / from_bf16 - 1:+7.1%}"
    print(line, *(f"{rate:9.1f} x{rate / theirs:6.1f}" for rate in rest), flush=True)


def bench_quantize(types: tuple[str, ...] = TYPES) -> None:
    """Print the table."""
    best, *others = instruction_sets()
    print(f"libggml {native.ggml_library().version}; M weights/s, one thread")
    head = f"{'':17}{'libggml':>9} {best:>9} {'ratio':>7} {'2 thr':>6} {'bf16':>7}"
    print(head, *(f"{isa:>9}   ratio" for isa in others))
    importance = (np.random.default_rng(1).random(K) ** 4).astype(np.float32)
    for name in types:
        for weights in (None,) if name == "q8_0" else (None, importance):
            _bench(name, weights)
    extension.use_isa(best)


if __name__ == "__main__":
    bench_quantize(tuple(sys.argv[1:]) or TYPES)
