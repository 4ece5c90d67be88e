"""The formats of bitsandbytes beside bitsandbytes itself, in one process, interleaved, medians of seven.

    python -m tests.bench.bench_bitsandbytes

Both get one thread, then two. Their round trip is `quantize_4bit` and `dequantize_4bit` with double quantization.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

import edgetune_native as native
from tests.bench.timing import Call, medians


def _cases(torch: Any, bnb: Any, threads: int, n: int, k: int) -> dict[str, tuple[Call, Call]]:
    """Name -> (theirs, ours). Ours writes into a given array where theirs makes a new one each time."""
    weights = torch.from_numpy((np.random.default_rng(0).standard_normal((n, k)) * 0.05).astype(np.float32))
    brain = weights.to(torch.bfloat16)
    rows, halves, out = weights.numpy(), brain.view(torch.uint16).numpy(), np.empty((n, k), np.float32)
    packed, state = bnb.quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
    stored = native.quantize_4bit(rows, torch_threads=threads)
    codes, scb, _ = bnb.int8_vectorwise_quant(weights)
    eight, scales = codes.numpy(), scb.numpy()

    def theirs(source: Any) -> object:
        return bnb.dequantize_4bit(*bnb.quantize_4bit(source, quant_type="nf4", compress_statistics=True))

    def back(**options: Any) -> object:
        return native.dequantize_4bit(
            stored.packed, stored.absmax, (n, k), nested=stored.nested, threads=threads, **options
        )

    return {
        "nf4_roundtrip f32": (lambda: theirs(weights), lambda: native.nf4_roundtrip(rows, threads=threads)),
        "nf4_roundtrip bf16": (lambda: theirs(brain), lambda: native.nf4_roundtrip(halves, threads=threads)),
        "nf4_roundtrip f32, out=": (
            lambda: theirs(weights),
            lambda: native.nf4_roundtrip(rows, threads=threads, out=out),
        ),
        "quantize_4bit f32": (
            lambda: bnb.quantize_4bit(weights, quant_type="nf4", compress_statistics=True),
            lambda: native.quantize_4bit(rows, threads=threads),
        ),
        "dequantize_4bit f32": (lambda: bnb.dequantize_4bit(packed, state), back),
        "dequantize_4bit f32, out=": (lambda: bnb.dequantize_4bit(packed, state), lambda: back(out=out)),
        "dequantize_int8 f32": (
            lambda: bnb.int8_vectorwise_dequant(codes, scb),
            lambda: native.dequantize_int8(eight, scales, threads=threads),
        ),
    }


def bench_bitsandbytes(n: int = 2048, k: int = 4096) -> None:
    """Print M weights/s of both; nothing but a line if bitsandbytes is not installed."""
    try:
        torch: Any = importlib.import_module("torch")
        bnb: Any = importlib.import_module("bitsandbytes.functional")
    except ImportError as error:
        print(f"\nbitsandbytes: not compared ({error})")
        return
    before = torch.get_num_threads()
    print(f"\n{'M weights/s':26} {'threads':>7} {'theirs':>9} {'ours':>9}")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name, calls in _cases(torch, bnb, threads, n, k).items():
            theirs, ours = (n * k / second / 1e6 for second in medians(*calls))
            print(f"{name:26} {threads:7} {theirs:9.1f} {ours:9.1f}   x{ours / theirs:.2f}")
    torch.set_num_threads(before)


if __name__ == "__main__":
    bench_bitsandbytes()
