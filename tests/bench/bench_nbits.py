"""Block quantization for MatMulNBits: speed beside ONNX Runtime's own quantizer, and the error beside it and ggml's.

    python -m tests.bench.bench_nbits [MODEL.safetensors]

Speed: one process, interleaved, median of seven; ONNX Runtime's quantizer runs on one thread, so `1t` is the column to
hold beside it. Error: sum w (x - back)^2 relative to that of ONNX Runtime's rule for
the same format (search=False), so that 0.9 means a tenth less; columns are kinds of weights, and with a model the
matrices of that model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits
from safetensors.numpy import load_file

import edgetune_native as native
from tests.bench.timing import medians

BLOCK_SIZES = (16, 32, 64, 128, 256)
K = 2048
Rows = NDArray[np.float32]


def _onnxruntime(rows: Rows, bits: int, block_size: int, symmetric: bool) -> Callable[[], object]:
    """Their quantizer over the transposed matrix, which is what it takes; the transposing is not counted."""
    n, k = rows.shape
    k_blocks = k // block_size
    source = np.ascontiguousarray(rows.T)
    codes = np.zeros((n, k_blocks, block_size * bits // 8), np.uint8)
    scales, zeros = np.zeros(n * k_blocks, np.float32), np.zeros(n * -(-k_blocks * bits // 8), np.uint8)
    call = quantize_matmul_4bits if bits == 4 else quantize_matmul_8bits
    return lambda: call(codes, source, scales, zeros, block_size, n, k, symmetric)


def _speed(n: int = 512, k: int = 4096) -> None:
    rows = np.random.default_rng(0).standard_normal((n, k)).astype(np.float32)
    weights = np.random.default_rng(1).lognormal(0, 1, k).astype(np.float32)
    columns = ("onnxrt", "range", "range 1t", "search", "search 1t", "weighted", "f16 out")
    print(f"M weights/s{'':14}" + "".join(f"{name:>11}" for name in columns))
    for bits in (4, 8):
        for size in BLOCK_SIZES:
            for symmetric in (True, False):
                common: dict[str, Any] = {"bits": bits, "block_size": size, "symmetric": symmetric}
                options: tuple[dict[str, Any], ...] = (
                    {"search": False},
                    {"search": False, "threads": 1},
                    {},
                    {"threads": 1},
                    {"weights": weights},
                    {"scale_dtype": np.float16},
                )
                calls = [lambda o=o, c=common: native.quantize_blocks(rows, **c, **o) for o in options]
                rates = [rows.size / s / 1e6 for s in medians(_onnxruntime(rows, bits, size, symmetric), *calls)]
                name = f"{bits} bits, {size:3}, {'symmetric' if symmetric else 'zeros'}"
                print(f"{name:25}" + "".join(f"{rate:11.0f}" for rate in rates))


def _kinds(model: Path | None) -> dict[str, Rows]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, K))
    kinds = {
        "gauss": x,
        "laplace": rng.laplace(size=x.shape),
        "outliers": np.where(rng.random(x.shape) < 0.01, x * 8, x),
        "shifted": x + rng.standard_normal((len(x), 1)),
    }
    if model is not None:
        every = np.concatenate([part.ravel() for part in load_file(model).values() if part.ndim == 2])
        kinds["model"] = every[: every.size // K * K].reshape(-1, K)
    return {name: np.ascontiguousarray(rows, np.float32) for name, rows in kinds.items()}


def _error(rows: Rows, by: Rows, back: Rows) -> float:
    return float((by.astype(np.float64) * (rows.astype(np.float64) - back) ** 2).sum())


def _block_error(rows: Rows, by: Rows, bits: int, block_size: int, **options: Any) -> float:
    found = native.quantize_blocks(rows, bits, block_size=block_size, **options)
    return _error(rows, by, native.dequantize_blocks(*found, bits=bits, block_size=block_size, k=K))


def _ggml_error(rows: Rows, by: Rows, weights: Rows | None, name: str) -> float:
    return _error(rows, by, native.dequantize(native.quantize(rows, name, weights=weights), name, K))


def _errors(model: Path | None) -> None:
    kinds = _kinds(model)
    flat = np.ones(K, np.float32)
    importance = np.random.default_rng(1).lognormal(0, 1.5, K).astype(np.float32)
    for title, weights in (("all columns alike", None), ("importance exp(1.5 N(0, 1))", importance)):
        print(f"\nerror relative to search=False, {title}\n{'':25}" + "".join(f"{name:>11}" for name in kinds))
        by = flat if weights is None else weights
        for bits in (4, 8):
            for size in BLOCK_SIZES:
                for symmetric in (True, False):
                    common: dict[str, Any] = {"bits": bits, "block_size": size, "symmetric": symmetric}
                    parts = [
                        _block_error(rows, by, weights=weights, **common)
                        / _block_error(rows, by, search=False, **common)
                        for rows in kinds.values()
                    ]
                    name = f"{bits} bits, {size:3}, {'symmetric' if symmetric else 'zeros'}"
                    print(f"{name:25}" + "".join(f"{part:11.3f}" for part in parts))
        _beside_ggml(kinds, by, weights)


def _beside_ggml(kinds: dict[str, Rows], by: Rows, weights: Rows | None) -> None:
    """Blocks of 32 with float16 scales (4.5 bits a weight, 4.625 with zero points), as q4_0 and q4_1 and q4_k have."""
    halves: dict[str, Any] = {"bits": 4, "block_size": 32, "scale_dtype": np.float16}
    plain = [_block_error(rows, by, search=False, **halves) for rows in kinds.values()]
    found = {
        "ours, symmetric, 4.5 bpw": [_block_error(r, by, weights=weights, **halves) for r in kinds.values()],
        "ours, zeros, 4.63 bpw": [
            _block_error(r, by, weights=weights, symmetric=False, **halves) for r in kinds.values()
        ],
        **{
            f"{name}, {bits} bpw": [_ggml_error(rows, by, weights, name) for rows in kinds.values()]
            for name, bits in (("q4_0", 4.5), ("q4_1", 5), ("q4_k", 4.5))
        },
    }
    print("blocks of 32, float16 scales, relative to symmetric search=False")
    for name, errors in found.items():
        print(f"{name:25}" + "".join(f"{error / base:11.3f}" for error, base in zip(errors, plain, strict=True)))


def bench_nbits(model: Path | None = None) -> None:
    """Print the tables; `model` is a safetensors file of floats whose matrices are quantized too."""
    print(f"MatMulNBits blocks, {native.cpu().isa}; 1t: one thread")
    _speed()
    _errors(model)


if __name__ == "__main__":
    bench_nbits(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
