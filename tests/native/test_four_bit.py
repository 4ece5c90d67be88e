"""NF4, FP4 and int8 without bitsandbytes: instruction sets, threads, pieces, refusals, the reference backend."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgetune_native import NestedAbsmax
from tests.native.backends import REFERENCE, Backend, native
from tests.native.golden import GOLDEN, digest, golden_weights
from tests.profiles import scaled

SETTINGS = settings(max_examples=scaled(0.5))
ROWS = (np.random.default_rng(0).standard_normal((300, 192)) * 0.05).astype(np.float32)

PACKED = np.zeros(96, np.uint8)
ABSMAX = np.ones(3, np.float32)
NESTED = NestedAbsmax(np.ones(1, np.float32), np.zeros(256, np.float32), 0.5)
CODES = np.zeros((4, 8), np.int8)
READ_ONLY = np.zeros((3, 64), np.float32)
READ_ONLY.flags.writeable = False
MEMORY = np.zeros((3, 64), np.float32)


def bits(weights: NDArray[np.float32]) -> bytes:
    return weights.tobytes()


def in_dtype(rows: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    if dtype == "bf16":
        return (rows.view(np.uint32) >> 16).astype(np.uint16)
    return rows.astype({"f32": np.float32, "f16": np.float16}[dtype])


@pytest.mark.parametrize("case", GOLDEN)
def test_recorded_results_of_bitsandbytes(backend: Backend, case: tuple[str, str, int, bool]) -> None:
    dtype, quant_type, blocksize, double_quant = case
    weights = golden_weights(dtype)
    options: dict[str, Any] = {"quant_type": quant_type, "blocksize": blocksize, "double_quant": double_quant}
    stored = backend.quantize_4bit(weights, **options)
    assert digest(stored.packed, backend.nf4_roundtrip(weights, **options)) == GOLDEN[case]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_every_instruction_set_and_thread_count(
    compiled: Backend, isas: tuple[str, ...], dtype: str, quant_type: str
) -> None:
    codes = np.random.default_rng(1).integers(-128, 128, (37, 1001), dtype=np.int8)
    scb = np.abs(ROWS.ravel()[:37])
    for k in (192, 191, 7):
        rows = in_dtype(np.ascontiguousarray(ROWS[:, :k]), dtype)
        results: set[tuple[Any, ...]] = set()
        for isa in isas:
            native.use_isa(isa)
            for threads in (1, 2, 5, 0):
                stored = compiled.quantize_4bit(rows, quant_type=quant_type, threads=threads)
                assert stored.nested is not None
                back = compiled.dequantize_4bit(
                    stored.packed,
                    stored.absmax,
                    (300, k),
                    quant_type=quant_type,
                    nested=stored.nested,
                    dtype=dtype,
                    threads=threads,
                )
                roundtrip = compiled.nf4_roundtrip(rows, quant_type=quant_type, threads=threads)
                assert bits(back) == bits(roundtrip)
                eight = compiled.dequantize_int8(codes, scb, dtype=dtype, threads=threads)
                parts = (stored.packed, stored.absmax, stored.nested.absmax, back, eight)
                results.add((stored.nested.offset, *(part.tobytes() for part in parts)))
        assert len(results) == 1


@SETTINGS
@given(
    n=st.integers(1, 50),
    k=st.integers(1, 200),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(["f32", "f16", "bf16"]),
    to=st.sampled_from([None, "f32", "f16", "bf16"]),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    double_quant=st.booleans(),
)
def test_both_backends_give_the_same(
    compiled: Backend, n: int, k: int, seed: int, dtype: str, to: str | None, quant_type: str, double_quant: bool
) -> None:
    rows = in_dtype(np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32), dtype)
    options: dict[str, Any] = {"quant_type": quant_type, "double_quant": double_quant}
    assert bits(compiled.nf4_roundtrip(rows, dtype=to, **options)) == bits(
        REFERENCE.nf4_roundtrip(rows, dtype=to, **options)
    )
    ours, theirs = compiled.quantize_4bit(rows, **options), REFERENCE.quantize_4bit(rows, **options)
    assert ours.packed.tobytes() == theirs.packed.tobytes()
    assert ours.absmax.tobytes() == theirs.absmax.tobytes()


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_rounding_of_any_product(compiled: Backend, dtype: str) -> None:
    """The largest code is 1, so the absmax themselves are rounded: every exponent, ties, infinity and NaN."""
    edges = np.arange(0, 2**32, 2**12 - 1, dtype=np.uint64).astype(np.uint32)
    around = np.array([0x8000, 0x7FFF, 0x8001, 0x1000, 0x0FFF, 0x1001], np.uint32)
    ties = (np.arange(65536, dtype=np.uint32) << 16)[:, None] + around
    absmax = np.concatenate([edges, ties.ravel()]).view(np.float32)
    packed = np.full(absmax.size * 16, 0xFF, np.uint8)
    ours, theirs = (
        backend.dequantize_4bit(packed, absmax, (absmax.size, 32), blocksize=32, dtype=dtype)[:, 0]
        for backend in (compiled, REFERENCE)
    )
    assert np.array_equal(np.isnan(ours), np.isnan(absmax))
    assert np.array_equal(ours, theirs, equal_nan=True)
    number = ~np.isnan(absmax)
    assert ours[number].tobytes() == theirs[number].tobytes()


@pytest.mark.parametrize("double_quant", [False, True])
def test_pieces_of_a_tensor(backend: Backend, double_quant: bool) -> None:
    """As the merge streams: the absmax of all pieces first, then each piece with its scales, in any order."""
    rows = np.concatenate([ROWS, ROWS[::-1] * 2, ROWS * 3])[:811]
    whole = backend.nf4_roundtrip(rows, double_quant=double_quant)
    pieces = [slice(first, first + 100) for first in range(0, len(rows), 100)]
    scales = np.concatenate([backend.block_absmax(rows[piece]) for piece in pieces])
    if double_quant:
        scales = backend.nested_scales(scales)
    per_row = 192 // 64
    out = np.empty((100, 192), np.float32)
    for piece in reversed(pieces):
        target = out[: len(rows[piece])]
        part = scales[piece.start * per_row : piece.stop * per_row]
        assert backend.nf4_roundtrip(rows[piece], scales=part, out=target) is target
        assert bits(target) == bits(np.ascontiguousarray(whole[piece]))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(300, 192), (300, 96), (100, 3, 192), (57600,), (640, 90)])
def test_some_rows_only(backend: Backend, shape: tuple[int, ...], double_quant: bool) -> None:
    stored = backend.quantize_4bit(ROWS, double_quant=double_quant)
    count = int(np.prod(shape))
    packed, absmax, nested = stored.packed[: count // 2], stored.absmax[: count // 64], stored.nested
    if nested is not None:
        nested = nested._replace(absmax=nested.absmax[: -(-absmax.size // 256)])
    whole = backend.dequantize_4bit(packed, absmax, shape, nested=nested)
    n = shape[0]
    for rows in ((0, n), (0, 1), (1, 2), (n - 1, n), (n // 3, n // 2), (7, 7), (n, n)):
        part = backend.dequantize_4bit(packed, absmax, shape, nested=nested, rows=rows)
        assert part.shape == whole[slice(*rows)].shape
        assert bits(part) == bits(np.ascontiguousarray(whole[slice(*rows)]))


def saved(**changes: Any) -> dict[str, Any]:
    facts = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [3, 64]} | {
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": 0.5,
    }
    text = json.dumps({key: value for key, value in (facts | changes).items() if value is not None})
    return {
        "w": PACKED.reshape(-1, 1),
        "w.absmax": np.zeros(3, np.uint8),
        "w.quant_map": np.zeros(16, np.float32),
        "w.nested_absmax": NESTED.absmax,
        "w.nested_quant_map": NESTED.quant_map,
        "w.quant_state.bitsandbytes__nf4": np.frombuffer(text.encode(), np.uint8),
    }


def test_a_saved_state(backend: Backend) -> None:
    stored = backend.saved_4bit("w", saved())
    assert (stored.shape, stored.quant_type, stored.blocksize, stored.dtype) == ((3, 64), "nf4", 64, "bf16")
    assert stored.nested is not None
    assert (stored.nested.offset, stored.nested.blocksize) == (0.5, 256)


@pytest.mark.parametrize(
    ("tensors", "kind", "message"),
    [
        ({}, KeyError, "w has 0 tensors quant_state"),
        (saved(dtype="int8"), ValueError, "the quant_state of w cannot be read.*int8"),
        (saved(dtype=None), ValueError, "cannot be read.*dtype"),
        (saved(shape=5), ValueError, "cannot be read.*shape must be"),
        (saved(quant_type="fp4"), ValueError, "quant_type is 'fp4', expected one of nf4"),
        (saved(nested_offset=None), ValueError, "cannot be read.*nested_offset"),
        (saved(nested_dtype="float16"), ValueError, "nested_dtype is 'float16'"),
        ({**saved(), "w.quant_state.bitsandbytes__nf4": np.frombuffer(b"{", np.uint8)}, ValueError, "cannot be read"),
    ],
)
def test_a_saved_state_that_is_wrong(backend: Backend, tensors: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        backend.saved_4bit("w", tensors)


def test_a_recorded_offset_and_map_change_the_result(backend: Backend) -> None:
    stored = backend.quantize_4bit(ROWS)
    assert stored.nested is not None
    again = backend.nf4_roundtrip(ROWS, offset=stored.nested.offset, nested_quant_map=stored.nested.quant_map)
    assert bits(again) == bits(backend.nf4_roundtrip(ROWS))
    assert bits(backend.nf4_roundtrip(ROWS, offset=stored.nested.offset * 1.1)) != bits(again)
    linear = np.linspace(-1, 1, 256).astype(np.float32)
    assert bits(backend.nf4_roundtrip(ROWS, nested_quant_map=linear)) != bits(again)


def test_it_is_near_the_weights(backend: Backend) -> None:
    error = np.abs(backend.nf4_roundtrip(ROWS) - ROWS).mean() / np.abs(ROWS).mean()
    assert 0.05 < error < 0.12


def test_nothing_to_dequantize(backend: Backend) -> None:
    assert backend.dequantize_4bit(np.empty(0, np.uint8), np.empty(0, np.float32), (0, 64)).shape == (0, 64)
    assert backend.dequantize_int8(np.empty((0, 64), np.int8), np.empty(0, np.float32)).shape == (0, 64)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_weights_that_are_not_finite_name_their_row(backend: Backend, dtype: str, wrong: float) -> None:
    rows = ROWS.copy()
    rows[[177, 201], [191, 0]] = wrong
    out = np.full(rows.shape, 7, np.float32)
    for call in (
        backend.block_absmax,
        backend.quantize_4bit,
        lambda rows: backend.nf4_roundtrip(rows, threads=2, out=out),
    ):
        with pytest.raises(ValueError, match="row 177 holds a NaN or an infinity"):
            call(in_dtype(rows, dtype))
    assert (out == 7).all()


def roundtrip_with(**changes: Any) -> Callable[[Backend], object]:
    arguments = {"rows": np.ones((3, 64), np.float32), **changes}
    return lambda backend: backend.nf4_roundtrip(**arguments)


def dequantize_with(**changes: Any) -> Callable[[Backend], object]:
    arguments = {"packed": PACKED, "absmax": ABSMAX, "shape": (3, 64), **changes}
    return lambda backend: backend.dequantize_4bit(**arguments)


def int8_with(**changes: Any) -> Callable[[Backend], object]:
    arguments = {"codes": CODES, "scb": np.ones(4, np.float32), **changes}
    return lambda backend: backend.dequantize_int8(**arguments)


REFUSALS: list[tuple[Callable[[Backend], object], type[Exception], str]] = [
    (roundtrip_with(rows=np.ones((3, 64))), TypeError, "rows has dtype float64, expected .*float32"),
    (roundtrip_with(rows=[[1.0]]), TypeError, "rows has type list"),
    (roundtrip_with(rows=np.ones(64, np.float32)), ValueError, r"rows has shape \(64,\)"),
    (roundtrip_with(rows=np.ones((0, 64), np.float32)), ValueError, "nothing to quantize"),
    (roundtrip_with(rows=np.ones((3, 128), np.float32)[:, ::2]), ValueError, "rows is not C-contiguous"),
    (roundtrip_with(blocksize=48), ValueError, "blocksize is 48, expected one of 32, 64, .*4096"),
    (roundtrip_with(quant_type="int4"), ValueError, "quant_type is 'int4', expected one of nf4, fp4"),
    (roundtrip_with(dtype="float32"), ValueError, "dtype is 'float32', expected one of f32, f16, bf16"),
    (roundtrip_with(offset=np.nan), ValueError, "offset is nan, expected a finite float32"),
    (roundtrip_with(offset=1e40), ValueError, "offset is 1e.40, expected a finite"),
    (roundtrip_with(offset="1"), TypeError, "offset must be a number, not str"),
    (roundtrip_with(offset=1.0, double_quant=False), ValueError, "need double_quant and exclude scales"),
    (roundtrip_with(nested_quant_map=np.zeros(255, np.float32)), ValueError, r"expected \(256\)"),
    (roundtrip_with(nested_quant_map=-np.arange(256, dtype=np.float32)), ValueError, "not finite and ascending"),
    (roundtrip_with(scales=ABSMAX[:2]), ValueError, r"scales has shape \(2,\), expected \(3\)"),
    (roundtrip_with(scales=ABSMAX, offset=1.0), ValueError, "exclude scales"),
    (lambda backend: backend.nested_scales(np.full(3, np.nan, np.float32)), ValueError, r"absmax\[0\] is not finite"),
    (roundtrip_with(torch_threads=0), ValueError, "torch_threads is 0"),
    (roundtrip_with(threads=-1), ValueError, "threads is -1"),
    (roundtrip_with(rows=np.full((4, 64), 3e38, np.float32)), ValueError, "the mean of the absmax is inf"),
    (roundtrip_with(out=np.zeros((3, 63), np.float32)), ValueError, r"out has shape \(3, 63\), expected \(3, 64\)"),
    (roundtrip_with(out=np.zeros((3, 64))), TypeError, "out has dtype float64"),
    (roundtrip_with(out=READ_ONLY), ValueError, "out is read-only"),
    (roundtrip_with(rows=MEMORY, out=MEMORY), ValueError, "out overlaps an input"),
    (dequantize_with(packed=PACKED[:95]), ValueError, "packed holds 95 bytes, expected 96 for the shape"),
    (dequantize_with(packed=PACKED.astype(np.int8)), TypeError, "packed has dtype int8"),
    (dequantize_with(packed=b"1"), TypeError, "packed must be a numpy array"),
    (dequantize_with(absmax=ABSMAX[:2]), ValueError, r"absmax has shape \(2,\), expected \(3\)"),
    (dequantize_with(absmax=np.zeros(3, np.uint8)), TypeError, "absmax has dtype uint8, expected float32"),
    (dequantize_with(nested=NESTED), TypeError, "absmax has dtype float32, expected uint8"),
    (dequantize_with(absmax=np.zeros(3, np.uint8), nested=(1, 2)), TypeError, "nested must be a NestedAbsmax"),
    (
        dequantize_with(absmax=np.zeros(3, np.uint8), nested=NESTED._replace(absmax=ABSMAX)),
        ValueError,
        r"nested.absmax has shape \(3,\), expected \(1\)",
    ),
    (
        dequantize_with(absmax=np.zeros(3, np.uint8), nested=NESTED._replace(blocksize=0)),
        ValueError,
        "nested.blocksize is 0",
    ),
    (dequantize_with(shape=(3, -64)), ValueError, "none below 0"),
    (dequantize_with(shape=192), TypeError, "shape must be a tuple of int"),
    (dequantize_with(quant_map=np.zeros(16, np.float32)), ValueError, "quant_map is not that of nf4"),
    (dequantize_with(rows=(2, 4)), ValueError, "rows is .2, 4., expected 0 <= begin <= end <= 3"),
    (dequantize_with(rows=[0, 1]), TypeError, "rows must be .begin, end."),
    (dequantize_with(rows=(0, 1), out=MEMORY), ValueError, r"out has shape \(3, 64\), expected \(1, 64\)"),
    (dequantize_with(blocksize=True), ValueError, "blocksize is True"),
    (int8_with(codes=CODES.astype(np.uint8)), TypeError, "codes has dtype uint8, expected int8"),
    (int8_with(scb=np.ones(3, np.float32)), ValueError, r"scb has shape \(3,\), expected \(4\)"),
    (int8_with(scb=np.ones(4, np.float16)), TypeError, "scb has dtype float16"),
    (int8_with(dtype="bfloat16"), ValueError, "dtype is 'bfloat16'"),
    (lambda backend: backend.absmax_mean(ABSMAX[:0]), ValueError, "absmax is empty"),
]


@pytest.mark.parametrize(("call", "kind", "message"), REFUSALS)
def test_wrong_arguments_are_refused(
    backend: Backend, call: Callable[[Backend], object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        call(backend)


# The extension itself checks again what could corrupt memory.
X = np.ones(64, np.float32)
VALUES = np.linspace(-1, 1, 16).astype(np.float32)
OUT = np.zeros(64, np.float32)
BYTES = np.zeros(32, np.uint8)
ONE = np.ones(1, np.float32)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("absmax_4bit", (X, 0, 1, 64, 64, ONE[:0], 1), "absmax holds 0 bytes, expected 4"),
        ("absmax_4bit", (X, 3, 1, 64, 64, ONE, 1), "dtype 3"),
        ("absmax_4bit", (X, 0, 1, 64, 8192, ONE, 1), "blocksize is 8192"),
        ("absmax_4bit", (X, 0, 1, 64, 63, ONE, 1), "blocksize is 63"),
        ("absmax_4bit", (X, 0, 2**40, 2**40, 64, ONE, 1), "are not a size"),
        ("absmax_4bit", (X, 0, 64, 0, 64, ONE, 1), "are not a size"),
        ("torch_mean", (X, 65, 1), "values holds 256 bytes, expected 260"),
        ("torch_mean", (X, 0, 1), "a mean of 0 numbers"),
        ("torch_mean", (X, 64, 0), "on 0 threads"),
        ("nest_absmax", (X, 64, 0.0, BYTES, 256, BYTES, ONE, 1), "nearest holds 32 bytes, expected 65536"),
        ("unnest_absmax", (BYTES, 32, X, ONE, 256, 0.0, OUT[:32], 1), "map holds 256 bytes, expected 1024"),
        ("quantize_4bit", (X, 0, 1, 64, ONE, 64, VALUES[:15], BYTES, 1), "values holds 60 bytes"),
        ("quantize_4bit", (X, 0, 1, 64, ONE, 64, VALUES, BYTES[:31], 1), "packed holds 31 bytes, expected 32"),
        ("dequantize_4bit", (BYTES, 64, ONE, 64, VALUES, 0, OUT[:63], 1), "out holds 252 bytes, expected 256"),
        ("dequantize_4bit", (BYTES, 65, ONE, 64, VALUES, 0, OUT, 1), "packed holds 32 bytes, expected 33"),
        ("roundtrip_4bit", (X, 0, 1, 64, ONE, ONE[:0], 64, VALUES, 0, OUT, 1), "scales holds 0 bytes"),
        ("roundtrip_4bit", (X, 0, 1, 64, ONE, ONE, 64, VALUES, -1, OUT, 1), "dtype -1"),
        ("dequantize_int8", (BYTES, ONE, 2, 16, 0, OUT[:32], 1), "scb holds 4 bytes, expected 8"),
    ],
)
def test_the_extension_checks_memory_again(
    compiled: Backend, name: str, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(native, name)(*arguments)
    assert not OUT.any()
    assert not BYTES.any()
