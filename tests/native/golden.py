"""Digests of what bitsandbytes 0.50.2 gives for some weights, so that they can be checked where it is not installed."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

GOLDEN: dict[tuple[str, str, int, bool], str] = {
    ("f32", "nf4", 64, True): "728ed7096031409a",
    ("bf16", "nf4", 64, True): "42a4ea4c7cd75425",
    ("f16", "nf4", 64, True): "ada83524b9b13ff8",
    ("bf16", "nf4", 64, False): "678f267896f5ae96",
    ("f32", "nf4", 32, True): "84f60a0ae1437572",
    ("bf16", "fp4", 64, True): "fbc79f5b65512386",
}


def golden_weights(dtype: str) -> NDArray[Any]:
    """[67, 192] weights without a random generator: sums of a few integers' residues, scaled by the row."""
    i = np.arange(67 * 192, dtype=np.int64)
    mixed = sum((i * step + i * i * 31) % modulus - modulus // 2 for step, modulus in ((17, 97), (5, 89), (11, 101)))
    rows = np.float32(mixed).reshape(67, 192) * np.float32(2) ** (-7 - np.arange(67, dtype=np.float32)[:, None] % 6)
    rows[3, :64] = 0
    if dtype == "bf16":
        return (rows.view(np.uint32) >> 16).astype(np.uint16)
    return rows.astype({"f32": np.float32, "f16": np.float16}[dtype])


def digest(packed: NDArray[np.uint8], weights: NDArray[np.float32]) -> str:
    """Of the packed codes and of the float32 that they stand for (with one zero only)."""
    return hashlib.sha256(packed.tobytes() + (weights + np.float32(0)).tobytes()).hexdigest()[:16]
