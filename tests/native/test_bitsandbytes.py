"""NF4, FP4 and int8 against the installed bitsandbytes on the CPU, bit for bit. Skipped where it is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgetune_native import FourBit, _bnb_maps
from tests.native.backends import Backend, native
from tests.native.golden import GOLDEN, digest, golden_weights
from tests.pairwise import pairwise
from tests.profiles import scaled

torch: Any = pytest.importorskip("torch")
bnb: Any = pytest.importorskip("bitsandbytes.functional")
generic: Any = pytest.importorskip("bitsandbytes.backends.default.ops")

# Elsewhere torch.linspace, from which bitsandbytes builds its 8-bit map, rounds otherwise: there we are given its map.
USUAL_MAP = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SETTINGS = settings(max_examples=scaled(0.5))


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """Without torch.compile, which would start a compiler; and with the number of threads put back."""
    threads = torch.get_num_threads()
    with torch.compiler.set_stance("force_eager"):
        yield
    torch.set_num_threads(threads)


def tensor(rows: NDArray[Any], dtype: str) -> Any:
    return torch.from_numpy(np.ascontiguousarray(rows, np.float32)).to(DTYPES[dtype])


def array(weights: Any) -> NDArray[Any]:
    """As our functions take it: bfloat16 as uint16."""
    found: NDArray[Any] = (weights.view(torch.uint16) if weights.dtype == torch.bfloat16 else weights).numpy()
    return found


def gaussian(shape: tuple[int, ...], seed: int = 0, scale: float = 0.05) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def same_bits(ours: NDArray[np.float32], theirs: Any) -> bool:
    """Equal to the last bit; FP4's second zero may be -0 in bitsandbytes (see edgetune_native/bitsandbytes.py)."""
    expected = theirs.float().numpy()
    zero = (ours == 0) & (expected == 0)
    return bool(((ours.view(np.uint32) == expected.view(np.uint32)) | zero).all())


def dequantized(packed: Any, state: Any) -> Any:
    """bitsandbytes' own; through its generic path where its AVX-512 path takes the absmax of other blocks."""
    if state.shape[-1] % state.blocksize == 0 or state.shape[-1] % 16:
        return bnb.dequantize_4bit(packed, state).reshape(state.shape)  # a single byte comes back transposed
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    code = bnb.get_4bit_type(state.quant_type, device="cpu")
    return generic._dequantize_4bit_compute(packed.reshape(-1), absmax, code, state.blocksize, state.shape, state.dtype)


def assert_same(backend: Backend, weights: Any, dtype: str, **options: Any) -> None:
    """Bytes, state, both ways back, and the round trip."""
    theirs = {"compress_statistics" if key == "double_quant" else key: value for key, value in options.items()}
    packed, state = bnb.quantize_4bit(weights, **theirs)
    if state.nested and not USUAL_MAP:
        options["nested_quant_map"] = state.state2.code.numpy()
    ours = backend.quantize_4bit(array(weights), torch_threads=torch.get_num_threads(), **options)
    assert np.array_equal(ours.packed, packed.numpy().ravel())
    assert np.array_equal(ours.absmax, state.absmax.numpy())
    assert ours.absmax.dtype == state.absmax.numpy().dtype
    assert np.array_equal(ours.quant_map, state.code.numpy())
    assert (ours.dtype, ours.shape) == (dtype, tuple(state.shape))
    if state.nested:
        assert ours.nested is not None
        assert ours.nested.offset == state.offset.item()
        assert np.array_equal(ours.nested.absmax, state.state2.absmax.numpy())
        assert np.array_equal(ours.nested.quant_map, state.state2.code.numpy())
    expected = dequantized(packed, state)
    assert same_bits(back(backend, ours), expected)
    roundtrip = backend.nf4_roundtrip(array(weights), torch_threads=torch.get_num_threads(), **options)
    assert same_bits(roundtrip, expected)


def back(backend: Backend, stored: FourBit) -> NDArray[np.float32]:
    weights: NDArray[np.float32] = backend.dequantize_4bit(
        stored.packed,
        stored.absmax,
        stored.shape,
        quant_type=stored.quant_type,
        blocksize=stored.blocksize,
        nested=stored.nested,
        quant_map=stored.quant_map,
        dtype=stored.dtype,
        threads=2,
    )
    return weights


# --- the tables ----------------------------------------------------------------------------------------------------


def test_maps_are_those_of_bitsandbytes() -> None:
    for name in _bnb_maps.QUANT_TYPES:
        assert _bnb_maps.four_bit_map(name).tobytes() == bnb.get_4bit_type(name, device="cpu").numpy().tobytes()
    if USUAL_MAP:
        assert _bnb_maps.dynamic_map().tobytes() == bnb.create_dynamic_map().numpy().tobytes()


def test_bounds_are_those_of_bitsandbytes(backend: Backend) -> None:
    """Every float within 100 of a bound, in blocks whose absmax is 1."""
    for name in _bnb_maps.QUANT_TYPES:
        bounds = generic._get_4bit_quantize_bounds(name, torch.device("cpu"))[0].numpy()
        near = (bounds.view(np.int32)[:, None] + np.arange(-100, 101)).astype(np.int32).view(np.float32).ravel()
        near = np.append(near, np.arange(-100, 101, dtype=np.int32).view(np.float32)[100:])
        near = near[np.abs(near) <= 1]
        weights = np.ones((-(-near.size // 31), 32), np.float32)
        weights[:, 1:].flat[: near.size] = near
        assert_same(backend, tensor(weights, "f32"), "f32", quant_type=name, blocksize=32, double_quant=False)


def test_nested_codes_at_every_step(compiled: Backend) -> None:
    """bitsandbytes rounds to 65536 steps before it looks up: the floats around each edge between two steps."""
    edges = ((np.arange(65535) + 0.5) / 65535 * 2 - 1).astype(np.float32)
    near = (edges.view(np.int32)[:, None] + np.arange(-4, 5)).astype(np.int32).view(np.float32).ravel()
    values = np.ones((-(-near.size // 255), 256), np.float32)
    values[:, 1:].flat[: near.size] = near
    for scale in (1.0, 0.037, 3e-5):
        scaled = values.ravel() * np.float32(scale)
        theirs, state = bnb.quantize_blockwise(torch.from_numpy(scaled), blocksize=256)
        codes, absmax = np.empty(scaled.size, np.uint8), np.empty(values.shape[0], np.float32)
        nearest = _bnb_maps.nearest_codes(state.code.numpy())
        native.nest_absmax(scaled, scaled.size, 0.0, nearest, 256, codes, absmax, 2)
        assert np.array_equal(codes, theirs.numpy())
        assert np.array_equal(absmax, state.absmax.numpy())


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 9, 40])
def test_mean_is_that_of_torch(compiled: Backend, threads: int) -> None:
    torch.set_num_threads(threads)
    sizes = [*range(1, 140), 255, 257, 1000, 4097, 32767, 32768, 32769, 65537, 100_003, 262_144, 1_000_003, 5_000_001]
    values = np.abs(gaussian((sizes[-1],)))
    for size in sizes:
        expected = torch.from_numpy(values[:size]).mean().item()
        assert compiled.absmax_mean(values[:size], torch_threads=threads) == expected, size


@SETTINGS
@given(size=st.integers(1, 200_000), threads=st.integers(1, 20), seed=st.integers(0, 99))
def test_mean_of_any_size(compiled: Backend, size: int, threads: int, seed: int) -> None:
    torch.set_num_threads(threads)
    values = np.random.default_rng(seed).random(size, np.float32) ** 4
    assert compiled.absmax_mean(values, torch_threads=threads) == torch.from_numpy(values).mean().item()


# --- 4 bits --------------------------------------------------------------------------------------------------------


@pairwise(dtype=DTYPES, quant_type=["nf4", "fp4"], blocksize=BLOCKSIZES, double_quant=[False, True])
def test_every_format_gives_the_bytes_of_bitsandbytes(
    backend: Backend, dtype: str, quant_type: str, blocksize: int, double_quant: bool
) -> None:
    for shape in ((96, 4096), (7, 64), (13, 1000), (5, 33), (1, 1)):
        options = {"quant_type": quant_type, "blocksize": blocksize, "double_quant": double_quant}
        assert_same(backend, tensor(gaussian(shape), dtype), dtype, **options)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_weights_large_enough_for_torch_to_use_its_threads(backend: Backend, threads: int) -> None:
    torch.set_num_threads(threads)
    for dtype in DTYPES:
        assert_same(backend, tensor(gaussian((600, 4096)), dtype), dtype, quant_type="nf4", double_quant=True)


@SETTINGS
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 300),
    blocksize=st.sampled_from(BLOCKSIZES[:4]),
    quant_type=st.sampled_from(_bnb_maps.QUANT_TYPES),
    dtype=st.sampled_from(list(DTYPES)),
    double_quant=st.booleans(),
    exponent=st.integers(-30, 8),
    spread=st.sampled_from([0.0, 1.0, 4.0]),
    zeros=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_weights_give_the_bytes_of_bitsandbytes(
    backend: Backend,
    n: int,
    k: int,
    blocksize: int,
    quant_type: str,
    dtype: str,
    double_quant: bool,
    exponent: int,
    spread: float,
    zeros: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    rows = gaussian((n, k), seed, 2.0**exponent) * np.exp2(np.round(spread * rng.standard_normal((n, 1))))
    if zeros:
        rows.reshape(-1)[: blocksize * 2] = 0
        rows[rng.random(rows.shape) < 0.2] = 0
    options = {"quant_type": quant_type, "blocksize": blocksize, "double_quant": double_quant}
    assert_same(backend, tensor(np.clip(rows, -6e4, 6e4), dtype), dtype, **options)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_half_gives_the_bytes_of_bitsandbytes(backend: Backend, quant_type: str, double_quant: bool) -> None:
    """All finite patterns as weights: f16 in its own order, bf16 from 2^-90 up (below, their AVX512-BF16 gives 0)."""
    patterns = np.arange(65536, dtype=np.uint16)
    f16 = torch.from_numpy(patterns.view(np.float16)[np.isfinite(patterns.view(np.float16))].reshape(-1, 64).copy())
    assert_same(backend, f16, "f16", quant_type=quant_type, double_quant=double_quant)
    size = patterns & 0x7FFF
    top = 0x7F80 if not double_quant else 0x7000  # the mean of the largest overflows
    bf16 = torch.from_numpy(patterns[(size < top) & (size >= 0x1280)].copy()).view(torch.bfloat16)
    assert_same(
        backend,
        bf16[: bf16.numel() // 64 * 64].reshape(-1, 64),
        "bf16",
        quant_type=quant_type,
        double_quant=double_quant,
    )


def test_zeros_and_the_smallest(backend: Backend) -> None:
    rows = np.zeros((5, 64), np.float32)
    for smallest in (0.0, 1e-45, 3e-39, 1e-38, 1.2e-38, 2e-38):
        rows[2, 5] = smallest
        rows[4, 7:] = -smallest
        for double_quant in (False, True):
            assert_same(backend, tensor(rows, "f32"), "f32", quant_type="nf4", double_quant=double_quant)
            assert_same(backend, tensor(rows[:, :33], "f32"), "f32", quant_type="nf4", double_quant=double_quant)


def test_the_largest_weights_give_the_bytes_of_bitsandbytes(backend: Backend) -> None:
    rows = gaussian((4, 64), scale=1e38)
    rows[1, 3] = np.finfo(np.float32).max
    assert_same(backend, tensor(rows, "f32"), "f32", quant_type="nf4", double_quant=False)
    assert_same(backend, tensor(rows, "f32") / 1e34, "f32", quant_type="nf4", double_quant=True)


def test_a_saved_checkpoint(backend: Backend) -> None:
    """The tensors and the JSON that bitsandbytes saves, with 1 to 3 dimensions, to any dtype."""
    for double_quant in (False, True):
        for shape in ((256, 128), (64,), (3, 5, 64)):
            weights = tensor(gaussian(shape), "bf16")
            packed, state = bnb.quantize_4bit(weights, quant_type="nf4", compress_statistics=double_quant)
            tensors = {f"w.{key}": value.numpy() for key, value in state.as_dict(packed=True).items()}
            stored = backend.saved_4bit("w", {"w": packed.numpy(), "other": np.zeros(1), **tensors})
            assert (stored.shape, stored.dtype) == (shape, "bf16")
            assert (stored.nested is not None) == double_quant
            for dtype in DTYPES:
                state.dtype = DTYPES[dtype]
                assert same_bits(back(backend, stored._replace(dtype=dtype)), bnb.dequantize_4bit(packed, state))


@SETTINGS
@given(
    seed=st.integers(0, 2**20), dtype=st.sampled_from(list(DTYPES)), quant_type=st.sampled_from(_bnb_maps.QUANT_TYPES)
)
def test_any_bytes_and_absmax(backend: Backend, seed: int, dtype: str, quant_type: str) -> None:
    """Codes and scales that no quantizer wrote; products from 2^-126 up, as for every half."""
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (8 * 64 // 2, 1), dtype=np.uint8)
    absmax = (rng.integers(0, 2**31, 8, dtype=np.uint32) % 0x72000000 + 0x0D000000).view(np.float32)
    state = bnb.QuantState(
        torch.from_numpy(absmax),
        shape=torch.Size((8, 64)),
        code=bnb.get_4bit_type(quant_type, device="cpu"),
        blocksize=64,
        quant_type=quant_type,
        dtype=DTYPES[dtype],
    )
    ours = backend.dequantize_4bit(packed, absmax, (8, 64), quant_type=quant_type, dtype=dtype)
    assert same_bits(ours, bnb.dequantize_4bit(torch.from_numpy(packed), state))


@pytest.mark.skipif(not USUAL_MAP, reason="the digests were taken with the usual 8-bit map")
def test_the_golden_digests_are_those_of_bitsandbytes() -> None:
    torch.set_num_threads(1)
    for (dtype, quant_type, blocksize, double_quant), expected in GOLDEN.items():
        weights = torch.from_numpy(golden_weights(dtype))
        weights = weights.view(torch.bfloat16) if dtype == "bf16" else weights
        packed, state = bnb.quantize_4bit(
            weights, blocksize=blocksize, quant_type=quant_type, compress_statistics=double_quant
        )
        assert digest(packed.numpy(), dequantized(packed, state).float().numpy()) == expected


# --- 8 bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_int8_is_dequantized_as_bitsandbytes_does(backend: Backend, dtype: str) -> None:
    """Every code with many scales, and what transformers does: dequantize to float32, then cast."""
    scales = np.abs(gaussian((500,), scale=1.0)) * np.exp2(np.arange(500) % 40 - 30).astype(np.float32)
    codes = np.tile(np.arange(-128, 128, dtype=np.int16).astype(np.int8), (500, 1))
    expected = bnb.int8_vectorwise_dequant(torch.from_numpy(codes), torch.from_numpy(scales)).to(DTYPES[dtype])
    assert same_bits(backend.dequantize_int8(codes, scales, dtype=dtype, threads=2), expected)


def test_int8_of_a_quantized_weight(backend: Backend) -> None:
    weights = torch.from_numpy(gaussian((77, 123)))
    codes, scb, _ = bnb.int8_vectorwise_quant(weights.to(torch.float16))
    expected = bnb.int8_vectorwise_dequant(codes, scb)
    assert same_bits(backend.dequantize_int8(codes.numpy(), scb.numpy()), expected)
