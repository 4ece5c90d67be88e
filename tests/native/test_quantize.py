"""Quantizing and dequantizing: the bytes of ggml_quantize_chunk, for every type, input type, thread and row count."""

from __future__ import annotations

import gguf
import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.native import ggml
from tests.native.backends import Backend
from tests.profiles import scaled

K = 512
SETTINGS = settings(max_examples=scaled(0.5))
FAST_TYPES = tuple(name for name in ggml.ALL_TYPES if name not in ggml.MAY_REFUSE)


def gaussian(n: int, k: int = K, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def importance(k: int = K) -> NDArray[np.float32]:
    return (np.random.default_rng(1).random(k) ** 4).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "weighted"),
    [
        (name, weighted)
        for name in ggml.ALL_TYPES
        for weighted in (False, True)
        if weighted or name not in ggml.NEEDS_WEIGHTS
    ],
)
def test_bytes_are_those_of_ggml(backend: Backend, name: str, weighted: bool) -> None:
    weights = importance() if weighted else None
    rows = gaussian(9)
    expected = ggml.quantize(rows, name, weights)
    for threads in (0, 1, 2, 5):
        assert np.array_equal(backend.quantize(rows, name, weights=weights, threads=threads), expected)


@pytest.mark.parametrize("name", ["q8_0", "q4_k", "q6_k", "iq4_nl"])
@SETTINGS
@given(
    n=st.integers(1, 300),
    blocks=st.integers(1, 3),
    threads=st.integers(0, 9),
    seed=st.integers(0, 9),
    weighted=st.booleans(),
)
def test_any_row_and_thread_count(
    backend: Backend, name: str, n: int, blocks: int, threads: int, seed: int, weighted: bool
) -> None:
    k = 256 * blocks
    rows = gaussian(n, k, seed)
    weights = importance(k) if weighted else None
    assert np.array_equal(
        backend.quantize(rows, name, weights=weights, threads=threads), ggml.quantize(rows, name, weights)
    )


@pytest.mark.parametrize("name", FAST_TYPES)
@SETTINGS
@given(bits=arrays.arrays(np.uint32, (3, 256), elements=st.integers(0, 2**32 - 1), fill=st.integers(0, 2**32 - 1)))
def test_any_bit_pattern(backend: Backend, name: str, bits: NDArray[np.uint32]) -> None:
    rows = bits.view(np.float32)
    assert np.array_equal(backend.quantize(rows, name), ggml.quantize(rows, name))


def hostile_rows() -> dict[str, NDArray[np.float32]]:
    rows = {f"scaled by {scale}": gaussian(3) * np.float32(scale) for scale in (1e-42, 1e-30, 1e-18, 1e15, 1e30)}
    for value in (np.nan, np.inf, -np.inf, 3e38, -3e38, 0.0, -0.0, 0.5):
        rows[f"all {value}"] = np.full((3, K), value, np.float32)
        rows[f"one {value}"] = gaussian(3)
        rows[f"one {value}"][1, 77] = value
    rows["constant with an outlier"] = np.full((3, K), 0.5, np.float32)
    rows["constant with an outlier"][:, 9] = 1e30
    rows["bits"] = np.random.default_rng(2).integers(0, 2**32, (64, K), dtype=np.uint32).view(np.float32)
    rows["ties"] = np.round(gaussian(3) * 2) / 2
    return rows


@pytest.mark.parametrize("name", FAST_TYPES)
def test_hostile_rows_give_the_bytes_of_ggml(backend: Backend, name: str) -> None:
    for what, rows in hostile_rows().items():
        assert np.array_equal(backend.quantize(rows, name, threads=2), ggml.quantize(rows, name)), what


@pytest.mark.parametrize("name", ggml.MAY_REFUSE)
def test_rows_that_stop_ggml_are_an_error_that_names_the_row(backend: Backend, name: str) -> None:
    rows = gaussian(40)
    rows[17] = 3e38 if name in ("iq2_xxs", "iq1_m", "iq1_s") else rows[17] * 1e30
    with pytest.raises(ValueError, match="libggml cannot quantize row 17 "):
        backend.quantize(rows, name, weights=importance(), threads=2)
    # and libggml still works in this process
    expected = ggml.quantize(gaussian(2), name, importance())
    assert np.array_equal(backend.quantize(gaussian(2), name, weights=importance()), expected)


@pytest.mark.parametrize("name", ggml.MAY_REFUSE)
def test_hostile_rows_never_kill_the_process(compiled: Backend, name: str) -> None:
    refused = 0
    for rows in hostile_rows().values():
        try:
            compiled.quantize(rows, name, weights=importance(), threads=2)
        except ValueError:
            refused += 1
    assert refused


@pytest.mark.parametrize("name", FAST_TYPES)
def test_f16_and_bf16_rows(backend: Backend, name: str) -> None:
    half = gaussian(70).astype(np.float16)
    half[0, :8] = [0, -0.0, 6e-8, -6e-5, 65504, 1e-4, 2048.5, -1]
    assert np.array_equal(backend.quantize(half, name), ggml.quantize(half.astype(np.float32), name))
    brain = (gaussian(70).view(np.uint32) >> 16).astype(np.uint16)
    wide = (brain.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(backend.quantize(brain, name), ggml.quantize(wide, name))


def test_every_half_is_widened_exactly(backend: Backend) -> None:
    patterns = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for threads in (1, 3):
        halves = patterns.view(np.float16)
        assert np.array_equal(
            backend.quantize(halves, "f32", threads=threads).view(np.uint32)[~np.isnan(halves)],
            halves.astype(np.float32).view(np.uint32)[~np.isnan(halves)],
        )
        assert np.isnan(backend.quantize(halves, "f32").view(np.float32)[np.isnan(halves)]).all()
        assert np.array_equal(backend.quantize(patterns, "f32").view(np.uint32), patterns.astype(np.uint32) << 16)


@pytest.mark.parametrize("name", ggml.ALL_TYPES)
def test_dequantize_is_that_of_gguf(backend: Backend, name: str) -> None:
    weights = importance() if name in ggml.NEEDS_WEIGHTS else None
    blocks = ggml.quantize(gaussian(11), name, weights)
    number = gguf.GGMLQuantizationType(backend.ggml_type_id(name)) if backend.ggml_type_id(name) <= 40 else None
    values = backend.dequantize(blocks, name, K, threads=2)
    assert values.shape == (11, K)
    try:
        expected = None if number is None else gguf.quants.dequantize(blocks, number)
    except NotImplementedError:
        expected = None
    if expected is None:  # newer than gguf-py: at least close to what was quantized
        assert np.corrcoef(values.ravel(), gaussian(11).ravel())[0, 1] > 0.7
    else:
        assert np.array_equal(values, expected)


@pytest.mark.parametrize("name", ggml.ALL_TYPES)
def test_dequantize_of_random_bytes_does_not_crash(backend: Backend, name: str) -> None:
    blocks = np.random.default_rng(3).integers(0, 256, (5, backend.row_bytes(name, K)), dtype=np.uint8)
    assert backend.dequantize(blocks, name, K).shape == (5, K)


def test_sizes_are_those_of_libggml(backend: Backend) -> None:
    assert len(backend.types()) == 28
    for name in backend.types():
        k = 3 * backend.block_size(name)
        assert backend.row_bytes(name, k) == ggml.row_size(name, k) == 3 * backend.type_bytes(name)
    assert {name for name in backend.types() if backend.requires_weights(name)} == {"iq2_xxs", "iq2_xs", "iq1_s"}
    for member in gguf.GGMLQuantizationType:
        if member.name.lower() in backend.types():
            assert backend.ggml_type_id(member.name.lower()) == member.value
            assert gguf.GGML_QUANT_SIZES[member] == (
                backend.block_size(member.name.lower()),
                backend.type_bytes(member.name.lower()),
            )


def test_no_rows_give_no_bytes(backend: Backend) -> None:
    assert backend.quantize(np.empty((0, 256), np.float32), "q4_k").shape == (0, 144)
    assert backend.dequantize(np.empty((0, 144), np.uint8), "q4_k", 256).shape == (0, 256)


def test_the_buffer_of_the_caller_is_filled(backend: Backend) -> None:
    out = np.zeros((4, backend.row_bytes("q6_k", K)), np.uint8)
    assert backend.quantize(gaussian(4), "q6_k", out=out) is out
    assert np.array_equal(out, ggml.quantize(gaussian(4), "q6_k"))


def test_unaligned_rows_are_copied(backend: Backend) -> None:
    raw = np.zeros(4 * K * 2 + 1, np.uint8)
    raw[1:] = gaussian(2).view(np.uint8).ravel()
    unaligned = np.frombuffer(raw, np.float32, offset=1).reshape(2, K)
    assert np.array_equal(backend.quantize(unaligned, "q8_0"), ggml.quantize(gaussian(2), "q8_0"))
