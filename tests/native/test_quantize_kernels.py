"""Our own quantizers against libggml: the same bytes on every instruction set, whatever the rows hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from edgetune_converters.reading.checkpoint import Checkpoint
from tests.native import ggml
from tests.native.backends import Backend, native
from tests.profiles import scaled

OWN_TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs")
K = 512
SAMPLE = Path(__file__).parents[2] / "samples" / "smart-home" / "base"
SETTINGS = settings(max_examples=scaled(0.3))

Rows = NDArray[np.float32]


def bf16_bits(rows: Rows) -> NDArray[np.uint16]:
    return (rows.view(np.uint32) >> 16).astype(np.uint16)


def widened(bits: NDArray[np.uint16]) -> Rows:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def gaussian(n: int, k: int = K, seed: int = 0) -> Rows:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def importance(k: int = K, seed: int = 1) -> Rows:
    return (np.random.default_rng(seed).random(k) ** 4).astype(np.float32)


def patterns() -> dict[str, Rows]:
    """Rows of every kind that could take another way through a kernel; each [17, K], more than one group of lanes."""
    rng = np.random.default_rng(5)
    x = gaussian(17)
    found: dict[str, NDArray[Any]] = {
        "gaussian": x,
        "laplace": (rng.laplace(size=x.shape) * 0.02).astype(np.float32),
        "heavy tails": rng.standard_t(2, size=x.shape).astype(np.float32),
        "all positive": rng.random(x.shape).astype(np.float32),
        "all negative": -rng.random(x.shape).astype(np.float32) - 1,
        "far from zero": x * np.float32(1e-3) + 7,
        "rounded to bf16": widened(bf16_bits(x)),
        "ties": np.round(x * 2) / 2,
        "integers of a level": rng.integers(-8, 8, x.shape).astype(np.float32),
        "two values": np.where(rng.random(x.shape) < 0.5, np.float32(0.25), np.float32(-0.25)),
        "sparse": np.where(rng.random(x.shape) < 0.03, x, np.float32(0)),
        "zero blocks": x * np.repeat(rng.random((17, K // 32)) < 0.5, 32, axis=1),
        "negative zeros": np.where(rng.random(x.shape) < 0.5, np.float32(0), np.float32(-0.0)),
        "outliers": np.where(rng.random(x.shape) < 0.01, x * 1000, x),
        "blocks of many sizes": x * np.repeat(np.float32(10) ** rng.integers(-20, 20, (17, K // 32)), 32, axis=1),
        "last bits": (np.float32(1).view(np.uint32) + rng.integers(0, 4, x.shape, np.uint32)).view(np.float32),
        "denormals": rng.integers(0, 1 << 20, x.shape, np.uint32).view(np.float32),
        "any bits": rng.integers(0, 1 << 32, x.shape, np.uint32).view(np.float32),
        "infinities": x / (rng.random(x.shape) > 0.002),
        "NaN": np.where(rng.random(x.shape) < 0.002, np.float32(np.nan), x),
    }
    for value in (0.0, -0.0, 0.3, -0.3, 1e-15, 1e-30, 1e-42, 1e15, 1e30, 3e38, np.inf, -np.inf, np.nan):
        found[f"all {value}"] = np.full((17, K), value, np.float32)
        found[f"one {value}"] = x.copy()
        found[f"one {value}"][5, 77] = value
        found[f"only {value}"] = np.zeros((17, K), np.float32)
        found[f"only {value}"][:, 40::64] = value
        found[f"ones and {value}"] = np.full((17, K), 0.5, np.float32)
        found[f"ones and {value}"][::2, 300] = value
    for scale in (1e-40, 1e-30, 1e-18, 1e-14, 1e12, 1e18, 1e25, 1e37):
        found[f"scaled by {scale}"] = x * np.float32(scale)
    return {name: np.ascontiguousarray(rows, np.float32) for name, rows in found.items()}


def importances() -> dict[str, Rows | None]:
    zeros = importance()
    zeros[:300] = 0
    return {
        "none": None,
        "usual": importance(),
        "equal": np.ones(K, np.float32),
        "some zero": zeros,
        "all zero": np.zeros(K, np.float32),
        "huge": importance() * np.float32(1e30),
        "tiny": importance() * np.float32(1e-37),
        "denormal": np.full(K, 1e-42, np.float32),
        "one": (np.arange(K) == 3).astype(np.float32),
    }


@pytest.mark.parametrize("name", OWN_TYPES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the patterns divide by zero and overflow on purpose
def test_every_pattern_on_every_instruction_set(compiled: Backend, isas: tuple[str, ...], name: str) -> None:
    for weights_name, weights in importances().items():
        for rows_name, rows in patterns().items():
            expected = ggml.quantize(rows, name, weights)
            for isa in isas:
                native.use_isa(isa)
                found = compiled.quantize(rows, name, weights=weights, threads=1)
                assert np.array_equal(found, expected), f"{isa}: {rows_name}, weights {weights_name}"


@pytest.mark.parametrize("name", OWN_TYPES)
@SETTINGS
@given(
    bits=arrays(np.uint32, (3, 256), elements=st.integers(0, 2**32 - 1), fill=st.integers(0, 2**32 - 1)),
    importance_bits=arrays(np.uint32, 256, elements=st.integers(0, 0x7F7FFFFF)),
    weighted=st.booleans(),
)
def test_any_bits_on_every_instruction_set(
    compiled: Backend,
    isas: tuple[str, ...],
    name: str,
    bits: NDArray[np.uint32],
    importance_bits: NDArray[np.uint32],
    weighted: bool,
) -> None:
    rows = bits.view(np.float32)
    weights = importance_bits.view(np.float32) if weighted else None
    expected = ggml.quantize(rows, name, weights)
    for isa in isas:
        native.use_isa(isa)
        assert np.array_equal(compiled.quantize(rows, name, weights=weights), expected), isa


@pytest.mark.parametrize("name", OWN_TYPES)
@SETTINGS
@given(
    base=st.floats(-4, 4, width=32),
    steps=arrays(np.int32, (2, 256), elements=st.integers(-3, 3)),
    exponent=st.integers(-60, 60),
    weighted=st.booleans(),
)
def test_near_ties_are_rounded_alike_on_every_instruction_set(
    compiled: Backend,
    isas: tuple[str, ...],
    name: str,
    base: float,
    steps: NDArray[np.int32],
    exponent: int,
    weighted: bool,
) -> None:
    """Values a few units in the last place from each other, of any size."""
    rows = np.ldexp((np.float32(base).view(np.int32) + steps).view(np.float32), exponent).astype(np.float32)
    rows[~np.isfinite(rows)] = 0
    weights = importance(256) if weighted else None
    expected = ggml.quantize(rows, name, weights)
    for isa in isas:
        native.use_isa(isa)
        assert np.array_equal(compiled.quantize(rows, name, weights=weights), expected), isa


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", OWN_TYPES)
def test_every_row_count(compiled: Backend, isas: tuple[str, ...], name: str, weighted: bool) -> None:
    """Groups that are not full, and rows that begin in the middle of one."""
    for blocks in (1, 3, 7):
        k = blocks * compiled.block_size(name)
        rows, weights = gaussian(70, k), importance(k) if weighted else None
        expected = ggml.quantize(rows, name, weights)
        for isa in isas:
            native.use_isa(isa)
            for n in range(1, 71):
                assert np.array_equal(compiled.quantize(rows[:n], name, weights=weights), expected[:n]), (isa, n)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", OWN_TYPES)
def test_half_rows_give_the_bytes_of_their_values(
    compiled: Backend, isas: tuple[str, ...], name: str, weighted: bool
) -> None:
    rng = np.random.default_rng(8)
    weights = importance() if weighted else None
    for bits in (bf16_bits(gaussian(40)), rng.integers(0, 1 << 16, (40, K), np.uint16)):
        for isa in isas:
            native.use_isa(isa)
            from_bf16 = compiled.quantize(bits, name, weights=weights, threads=2)
            assert np.array_equal(from_bf16, ggml.quantize(widened(bits), name, weights)), isa
    half = gaussian(40).astype(np.float16)
    half[3, 3], half[9, 300] = np.inf, 6e-8
    for isa in isas:
        native.use_isa(isa)
        from_f16 = compiled.quantize(half, name, weights=weights, threads=2)
        assert np.array_equal(from_f16, ggml.quantize(half.astype(np.float32), name, weights)), isa


@pytest.mark.parametrize("name", OWN_TYPES)
def test_a_trained_model(compiled: Backend, isas: tuple[str, ...], name: str) -> None:
    """Every matrix of the sample's base."""
    seen = 0
    checkpoint = Checkpoint(SAMPLE)
    for tensor_name, info in checkpoint.tensors.items():
        if len(info.shape) != 2 or info.shape[1] % compiled.block_size(name):
            continue
        rows = checkpoint.rows(tensor_name, slice(0, min(300, info.shape[0])))
        expected = ggml.quantize(rows, name)
        for isa in isas:
            native.use_isa(isa)
            assert np.array_equal(compiled.quantize(rows, name), expected), (isa, tensor_name)
        seen += 1
    assert seen


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", OWN_TYPES)
def test_many_blocks(compiled: Backend, isas: tuple[str, ...], name: str, weighted: bool) -> None:
    """About three million weights a type from distributions of several shapes."""
    rng = np.random.default_rng(11)
    k = 2048
    for part in range(6):
        shape = float(2.0 ** rng.uniform(-2, 4))
        signs = np.where(rng.random((256, k)) < rng.uniform(0.2, 0.8), 1, -1)
        rows = (rng.gamma(shape, size=(256, k)) * signs * 10.0 ** rng.uniform(-4, 2)).astype(np.float32)
        weights = importance(k, seed=part) if weighted else None
        expected = ggml.quantize(rows, name, weights)
        for isa in isas:
            native.use_isa(isa)
            assert np.array_equal(compiled.quantize(rows, name, weights=weights), expected), (isa, part)
