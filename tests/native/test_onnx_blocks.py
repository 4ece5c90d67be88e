"""Blocks for MatMulNBits: the layout against ONNX Runtime itself, the search against the rule without it, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits

from edgetune_native import NBits
from tests.native.backends import COMPILED, REFERENCE, Backend, native
from tests.pairwise import pairwise
from tests.profiles import scaled

SETTINGS = settings(max_examples=scaled(0.5))
BLOCK_SIZES = (16, 32, 64, 128, 256)
Rows = NDArray[np.float32]

FORMATS = [(bits, size, symmetric) for bits in (4, 8) for size in BLOCK_SIZES for symmetric in (True, False)]
formats = pytest.mark.parametrize(("bits", "block_size", "symmetric"), FORMATS)


def gaussian(n: int, k: int, seed: int = 0) -> Rows:
    return (np.random.default_rng(seed).standard_normal((n, k)) * 0.02).astype(np.float32)


def bfloat16(rows: Rows) -> NDArray[np.uint16]:
    return (rows.view(np.uint32) >> 16).astype(np.uint16)


def unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The last axis as single codes, low half first; written apart from the product."""
    if bits == 8:
        return packed
    out = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    out[..., 0::2], out[..., 1::2] = packed % 16, packed // 16
    return out


def errors(rows: Rows, found: NBits, bits: int, block_size: int, weights: Rows | None = None) -> NDArray[np.float64]:
    """[n, k_blocks] sum w (x - scale * (q - zero point))^2 in double, where the products are exact."""
    n, k = rows.shape
    k_blocks = -(-k // block_size)
    d = unpack(found.codes, bits).astype(np.float64)
    if found.zero_points is None:
        d -= 2 ** (bits - 1)
    else:
        d -= unpack(found.zero_points, bits)[:, :k_blocks, None]
    filled = np.zeros((n, k_blocks * block_size))
    filled[:, :k] = rows
    importance = np.zeros(k_blocks * block_size)
    importance[:k] = 1 if weights is None else weights
    shape = (n, k_blocks, block_size)
    remainder = filled.reshape(shape) - found.scales[..., None].astype(np.float64) * d
    return np.asarray((importance.reshape(1, k_blocks, block_size) * remainder**2).sum(axis=-1))


def everything(found: NBits) -> bytes:
    return b"".join(part.tobytes() for part in found if part is not None)


# --- the layout, as ONNX Runtime reads it ----------------------------------------------------------------------------


def session(
    nodes: list[onnx.NodeProto], inputs: list[Any], parts: dict[str, NDArray[Any]]
) -> onnxruntime.InferenceSession:
    output = helper.make_tensor_value_info("y", inputs[0].type.tensor_type.elem_type, None)
    if inputs[0].name == "indices":
        output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    tensors = [numpy_helper.from_array(value, name) for name, value in parts.items()]
    graph = helper.make_graph(nodes, "blocks", inputs, [output], tensors)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def named(found: NBits) -> dict[str, NDArray[Any]]:
    parts: dict[str, NDArray[Any]] = {"codes": found.codes, "scales": found.scales}
    return parts if found.zero_points is None else parts | {"zero_points": found.zero_points}


def matmul(a: NDArray[Any], found: NBits, bits: int, block_size: int) -> NDArray[Any]:
    """a[m, k] @ weights[n, k].T by one MatMulNBits node at the default accuracy level."""
    n, k = len(found.codes), a.shape[1]
    parts = named(found)
    node = helper.make_node(
        "MatMulNBits", ["a", *parts], ["y"], domain="com.microsoft", K=k, N=n, bits=bits, block_size=block_size
    )
    kind = TensorProto.FLOAT if a.dtype == np.float32 else TensorProto.FLOAT16
    model = session([node], [helper.make_tensor_value_info("a", kind, ["m", k])], parts)
    return np.asarray(model.run(None, {"a": a})[0])


@pairwise(bits=[4, 8], block_size=BLOCK_SIZES, symmetric=[True, False], k=[512, 331])
def test_matmul_nbits_reads_it(backend: Backend, bits: int, block_size: int, symmetric: bool, k: int) -> None:
    rows, a = gaussian(24, k), gaussian(5, k, seed=1)
    found = backend.quantize_blocks(rows, bits, block_size=block_size, symmetric=symmetric)
    weights = backend.dequantize_blocks(*found, bits=bits, block_size=block_size, k=k)
    wanted = a.astype(np.float64) @ weights.T.astype(np.float64)
    size = np.abs(a).astype(np.float64) @ np.abs(weights.T).astype(np.float64)
    # f32 sums of k products, in whatever order: k * 2^-24 of the sum of sizes is the bound, a tenth of it a margin
    assert (np.abs(matmul(a, found, bits, block_size) - wanted) <= size * k * 2.0**-24 / 10 + 1e-12).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_matmul_nbits_reads_half_precision(compiled: Backend, bits: int, symmetric: bool) -> None:
    rows, a = gaussian(8, 330), gaussian(3, 330, seed=1).astype(np.float16)
    found = compiled.quantize_blocks(rows, bits, block_size=32, symmetric=symmetric, scale_dtype=np.float16)
    weights = compiled.dequantize_blocks(*found, bits=bits, block_size=32, k=330)
    wanted = a.astype(np.float64) @ weights.T
    np.testing.assert_allclose(matmul(a, found, bits, 32), wanted, rtol=2e-3, atol=2e-5)


@formats
def test_gather_block_quantized_reads_it(compiled: Backend, bits: int, block_size: int, symmetric: bool) -> None:
    rows = gaussian(40, 512)
    found = compiled.quantize_blocks(rows, bits, block_size=block_size, symmetric=symmetric)
    parts = named(found._replace(codes=found.codes.reshape(40, -1)))
    node = helper.make_node(
        "GatherBlockQuantized",
        ["codes", "indices", *list(parts)[1:]],
        ["y"],
        domain="com.microsoft",
        bits=bits,
        block_size=block_size,
        gather_axis=0,
        quantize_axis=1,
    )
    model = session([node], [helper.make_tensor_value_info("indices", TensorProto.INT64, ["m"])], parts)
    indices = np.array([3, 0, 39, 3])
    gathered = model.run(None, {"indices": indices})[0]
    assert np.array_equal(
        gathered, compiled.dequantize_blocks(*found, bits=bits, block_size=block_size, k=512)[indices]
    )


# each format with each k: the layout of the last block follows from both
@pairwise(form=FORMATS, k=[512, 331], dtype=[np.float32, np.float16])
def test_without_search_it_is_what_onnxruntime_writes(
    backend: Backend, form: tuple[int, int, bool], k: int, dtype: Any
) -> None:
    bits, block_size, symmetric = form
    rows = gaussian(12, k)
    rows[3, :256] = 0
    rows[4], rows[5] = np.abs(rows[4]), -np.abs(rows[5]) - np.float32(0.1)
    rows[6, :16] = np.tile(np.array([-1, 1], np.float32), 8)  # equal sizes: the negative one decides
    rows = rows.astype(dtype)
    k_blocks = -(-k // block_size)
    codes = np.zeros((12, k_blocks, block_size * bits // 8), np.uint8)
    scales = np.zeros(12 * k_blocks, dtype)
    zeros = np.zeros((12, -(-k_blocks * bits // 8)), np.uint8)
    theirs = quantize_matmul_4bits if bits == 4 else quantize_matmul_8bits
    theirs(codes, np.ascontiguousarray(rows.T), scales, zeros.reshape(-1), block_size, 12, k, symmetric)
    found = backend.quantize_blocks(
        rows, bits, block_size=block_size, symmetric=symmetric, search=False, scale_dtype=dtype
    )
    assert np.array_equal(found.scales, scales.reshape(12, k_blocks))
    assert found.zero_points is None if symmetric else np.array_equal(found.zero_points, zeros)
    # beyond k they write nothing, or a zero point that fills up a byte
    ours, other = (unpack(part, bits).reshape(12, -1)[:, :k] for part in (found.codes, codes))
    assert np.array_equal(ours, other)


# --- values ----------------------------------------------------------------------------------------------------------

KINDS = ("gauss", "laplace", "outliers", "shifted", "wide", "denormal", "large", "constant", "zeros")


def rows_of(kind: str, n: int, k: int, seed: int) -> Rows:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, k))
    with np.errstate(under="ignore"):
        rows = {
            "gauss": x,
            "laplace": rng.laplace(size=(n, k)),
            "outliers": np.where(rng.random((n, k)) < 0.02, x * 50, x),
            "shifted": x + 4,
            "wide": x * np.exp(rng.standard_normal((n, k)) * 6),
            "denormal": x * 1e-38,
            "large": x * 1e30,
            "constant": np.full((n, k), x[0, 0]),
            "zeros": x * 0,
        }[kind]
        return rows.astype(np.float32)


@SETTINGS
@given(
    n=st.integers(1, 20),
    k=st.integers(1, 600),
    bits=st.sampled_from([4, 8]),
    block_size=st.sampled_from(BLOCK_SIZES),
    symmetric=st.booleans(),
    weighted=st.booleans(),
    half=st.booleans(),
    kind=st.sampled_from(KINDS),
    threads=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_search_is_never_worse(
    backend: Backend,
    n: int,
    k: int,
    bits: int,
    block_size: int,
    symmetric: bool,
    weighted: bool,
    half: bool,
    kind: str,
    threads: int,
    seed: int,
) -> None:
    rows = rows_of("gauss" if half and kind == "large" else kind, n, k, seed)
    if half:
        rows = rows.clip(-1e5, 1e5)
    importance = np.random.default_rng(seed).lognormal(0, 2, k).astype(np.float32) if weighted else None
    if importance is not None and seed % 3 == 0:
        importance[: k // 2] = 0
    common = {"block_size": block_size, "symmetric": symmetric, "scale_dtype": np.float16 if half else np.float32}
    plain = backend.quantize_blocks(rows, bits, search=False, **common)
    found = backend.quantize_blocks(rows, bits, weights=importance, threads=threads, **common)
    before, after = (errors(rows, part, bits, block_size, importance) for part in (plain, found))
    assert (after <= before * (1 + 1e-12)).all()
    assert np.isfinite(found.scales).all()
    back = backend.dequantize_blocks(*found, bits=bits, block_size=block_size, k=k)
    assert back.shape == (n, k)
    assert np.isfinite(back).all()


def relative_error(kind: str, bits: int, block_size: int, symmetric: bool, weighted: bool, seed: int = 0) -> float:
    """The error with search as a part of that without, over a whole array."""
    rows = rows_of(kind, 64, 1024, seed)
    importance = np.random.default_rng(seed).lognormal(0, 1.5, 1024).astype(np.float32) if weighted else None
    backend = COMPILED
    plain = backend.quantize_blocks(rows, bits, block_size=block_size, symmetric=symmetric, search=False)
    found = backend.quantize_blocks(rows, bits, block_size=block_size, symmetric=symmetric, weights=importance)
    before, after = (errors(rows, part, bits, block_size, importance) for part in (plain, found))
    return float(after.sum() / before.sum())


@pytest.mark.parametrize(
    ("bits", "block_size", "symmetric", "weighted", "limit"),
    [  # one or two points above what is measured, so that a search that stops working is seen
        (4, 32, True, False, 0.91),
        (4, 128, True, False, 0.90),
        (4, 32, False, False, 0.92),
        (4, 128, False, False, 0.91),
        (4, 32, True, True, 0.69),
        (4, 32, False, True, 0.68),
        (8, 32, True, False, 0.79),
        (8, 128, True, False, 0.92),
        (8, 32, False, False, 0.76),
        (8, 128, False, False, 0.91),
        (8, 32, False, True, 0.50),
    ],
)
def test_search_gains(bits: int, block_size: int, symmetric: bool, weighted: bool, limit: float) -> None:
    assert relative_error("gauss", bits, block_size, symmetric, weighted) < limit


# each with a search of its own: integers, either kind of zero point; with importance; 8 bits
SEARCHES = ((4, 32, True, False), (4, 64, False, False), (4, 16, False, True), (8, 128, False, False))


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize(
    ("kind", "half"), [(kind, half) for kind in KINDS for half in (False, True) if kind != "large" or not half]
)
def test_instruction_sets_threads_and_backends_give_the_same_bytes(
    compiled: Backend, isas: tuple[str, ...], kind: str, half: bool, search: bool
) -> None:
    for bits, block_size, symmetric, weighted in SEARCHES:
        rows = rows_of(kind, 37, 301, 3)
        if half:
            rows = rows.clip(-1e5, 1e5)
        importance = np.random.default_rng(2).lognormal(0, 2, 301).astype(np.float32) if weighted else None
        arguments: dict[str, Any] = {
            "block_size": block_size,
            "symmetric": symmetric,
            "weights": importance,
            "search": search,
            "scale_dtype": "float16" if half else "float32",
        }
        wanted = everything(REFERENCE.quantize_blocks(rows, bits, **arguments))
        for isa in isas:
            native.use_isa(isa)
            for threads in (1, 2, 5):
                assert everything(compiled.quantize_blocks(rows, bits, threads=threads, **arguments)) == wanted


@SETTINGS
@given(n=st.integers(1, 40), k=st.integers(1, 70), at=st.integers(0, 39), symmetric=st.booleans())
def test_a_row_does_not_depend_on_its_neighbours(compiled: Backend, n: int, k: int, at: int, symmetric: bool) -> None:
    rows, row = gaussian(n, k), at % n
    whole = compiled.quantize_blocks(rows, 4, block_size=16, symmetric=symmetric)
    alone = compiled.quantize_blocks(rows[row : row + 1], 4, block_size=16, symmetric=symmetric)
    assert all(a is None or b is None or np.array_equal(a[row], b[0]) for a, b in zip(whole, alone, strict=True))


@pytest.mark.parametrize("search", [True, False])
def test_halves_are_widened_exactly(backend: Backend, search: bool) -> None:
    rows = gaussian(9, 300)
    half, brain = rows.astype(np.float16), bfloat16(rows)
    for source, wide in ((half, half.astype(np.float32)), (brain, (brain.astype(np.uint32) << 16).view(np.float32))):
        assert everything(backend.quantize_blocks(source, 4, block_size=32, search=search)) == everything(
            backend.quantize_blocks(wide, 4, block_size=32, search=search)
        )


def test_importance_counts_in_proportion_only(backend: Backend) -> None:
    rows = gaussian(4, 256)
    weights = np.random.default_rng(0).lognormal(0, 1, 256).astype(np.float32)
    found = [
        everything(backend.quantize_blocks(rows, 4, block_size=32, weights=weights * np.float32(2.0**power)))
        for power in (0, 100, -100)
    ]
    assert len(set(found)) == 1
    plain = backend.quantize_blocks(rows, 4, block_size=32, search=False)
    nothing = backend.quantize_blocks(rows, 4, block_size=32, weights=np.zeros(256, np.float32))
    assert everything(nothing) == everything(plain)  # no error to make smaller


def test_what_the_format_holds_comes_back_exactly(backend: Backend) -> None:
    """Blocks that are already on a grid have error 0, with and without search."""
    levels = np.random.default_rng(0).integers(-8, 8, (6, 64))
    levels[:, ::16] = -8
    rows = (levels * np.float32(0.125)).astype(np.float32)
    for search in (True, False):
        found = backend.quantize_blocks(rows, 4, block_size=16, search=search)
        assert np.array_equal(backend.dequantize_blocks(*found, bits=4, block_size=16, k=64), rows)


def test_blocks_without_values(backend: Backend) -> None:
    zeros = np.zeros((2, 40), np.float32)
    tiny = np.full((2, 40), 1e-40, np.float32)
    for rows in (zeros, tiny):
        symmetric = backend.quantize_blocks(rows, 4, block_size=32)
        assert not symmetric.scales.any()
        assert (symmetric.codes == 0x88).all()
        spread = backend.quantize_blocks(rows, 8, block_size=32, symmetric=False)
        assert spread.zero_points is not None
        assert not spread.scales.any()
        assert not spread.codes.any()
        assert not spread.zero_points.any()
    lost = backend.quantize_blocks(np.full((1, 32), 1e-8, np.float32), 4, block_size=32, scale_dtype=np.float16)
    assert not lost.scales.any()


def test_no_rows(backend: Backend) -> None:
    found = backend.quantize_blocks(np.empty((0, 40), np.float32), 4, block_size=16, symmetric=False)
    assert [part.shape for part in found if part is not None] == [(0, 3, 8), (0, 3), (0, 2)]
    assert backend.dequantize_blocks(*found, bits=4, block_size=16, k=40).shape == (0, 40)


# --- refusals --------------------------------------------------------------------------------------------------------

ROWS = np.ones((4, 50), np.float32)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite(backend: Backend, value: float, threads: int) -> None:
    rows = gaussian(64, 37)
    for row in (33, 34, 60):
        rows[row, 36] = value
    for source in (rows, rows.astype(np.float16), bfloat16(rows)):
        with pytest.raises(ValueError, match="row 33 holds a NaN or an infinity"):
            backend.quantize_blocks(source, 4, block_size=16, threads=threads)


@pytest.mark.parametrize("search", [True, False])
def test_scales_that_half_precision_cannot_hold(backend: Backend, search: bool) -> None:
    rows = gaussian(40, 37)
    rows[21, 36], rows[22, 0] = 1e6, np.nan
    with pytest.raises(ValueError, match="row 21 needs a scale above 65504"):
        backend.quantize_blocks(rows, 4, block_size=16, scale_dtype=np.float16, search=search)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"rows": ROWS.astype(np.float64)}, TypeError, "rows has dtype float64, expected .*float32"),
        ({"rows": [[1.0]]}, TypeError, "rows has type list"),
        ({"rows": ROWS[0]}, ValueError, r"rows has shape \(50,\)"),
        ({"rows": ROWS[:, ::2]}, ValueError, "rows is not C-contiguous"),
        ({"rows": ROWS[:, :0].copy()}, ValueError, "nothing to quantize"),
        ({"bits": 2}, ValueError, "bits is 2, expected one of 4, 8"),
        ({"bits": "4"}, TypeError, "bits must be an int, not str"),
        ({"block_size": 48}, ValueError, "block_size is 48, expected one of 16, 32, 64, 128, 256"),
        ({"block_size": True}, TypeError, "block_size must be an int, not bool"),
        ({"symmetric": 1}, TypeError, "symmetric must be a bool, not int"),
        ({"search": None}, TypeError, "search must be a bool, not NoneType"),
        ({"weights": np.ones(49, np.float32)}, ValueError, r"weights has shape \(49,\), expected \(50\)"),
        ({"weights": np.ones(50)}, TypeError, "weights has dtype float64, expected float32"),
        ({"weights": np.full(50, -1, np.float32)}, ValueError, r"weights\[0\] is -1.0"),
        ({"weights": np.full(50, np.inf, np.float32)}, ValueError, r"weights\[0\] is inf"),
        ({"scale_dtype": np.float64}, TypeError, "scale_dtype is float64, expected float32 or float16"),
        ({"threads": -1}, ValueError, "threads is -1"),
    ],
)
def test_wrong_arguments_are_refused(
    backend: Backend, changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"rows": ROWS, "bits": 4, "block_size": 16, **changes}
    with pytest.raises(kind, match=message):
        backend.quantize_blocks(**arguments)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"codes": np.zeros((4, 4, 7), np.uint8)}, ValueError, r"codes has shape \(4, 4, 7\), expected \(any, 4, 8\)"),
        ({"codes": np.zeros((4, 4, 8), np.int8)}, TypeError, "codes has dtype int8"),
        ({"scales": np.zeros((4, 3), np.float32)}, ValueError, r"scales has shape \(4, 3\), expected \(4, 4\)"),
        ({"scales": np.zeros((4, 4))}, TypeError, "scales has dtype float64, expected .* float32 or float16"),
        ({"zero_points": np.zeros((4, 4), np.uint8)}, ValueError, r"zero_points has shape \(4, 4\), expected \(4, 2\)"),
        ({"k": 0}, ValueError, "k is 0"),
        ({"k": 50.0}, TypeError, "k must be an int"),
        ({"k": 65}, ValueError, r"expected \(any, 5, 8\)"),
        ({"bits": 8}, ValueError, r"expected \(any, 4, 16\)"),
    ],
)
def test_wrong_arguments_of_dequantize_are_refused(
    backend: Backend, changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    found = backend.quantize_blocks(ROWS, 4, block_size=16, symmetric=False)
    arguments: dict[str, Any] = {**found._asdict(), "bits": 4, "block_size": 16, "k": 50, **changes}
    with pytest.raises(kind, match=message):
        backend.dequantize_blocks(**arguments)


def test_unaligned_rows_are_copied(backend: Backend) -> None:
    raw = np.zeros(4 * 50 * 4 + 1, np.uint8)
    raw[1:] = ROWS.view(np.uint8).ravel()
    unaligned = np.frombuffer(raw, np.float32, offset=1).reshape(4, 50)
    assert everything(backend.quantize_blocks(unaligned, 4, block_size=16)) == everything(
        backend.quantize_blocks(ROWS, 4, block_size=16)
    )


# The extension itself checks again what could corrupt memory.
ARGUMENTS: dict[str, Any] = {
    "rows": ROWS,
    "dtype": 0,
    "n": 4,
    "k": 50,
    "weights": None,
    "bits": 4,
    "block_size": 16,
    "symmetric": False,
    "search": True,
    "half": False,
    "codes": np.zeros((4, 4, 8), np.uint8),
    "scales": np.zeros((4, 4), np.float32),
    "zero_points": np.zeros((4, 2), np.uint8),
    "threads": 1,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ROWS[:3].copy()}, "rows holds 600 bytes, expected 800"),
        ({"dtype": 7}, "dtype 7"),
        ({"n": -1}, "are not a size"),
        ({"k": 0}, "0 weights is not a size"),
        ({"k": 2**62}, "is not a size"),
        ({"n": 2**60}, "are not a size"),
        ({"bits": 5}, "5 bits"),
        ({"block_size": 24}, "blocks of 24"),
        ({"block_size": 512}, "blocks of 512"),
        ({"weights": ROWS[0, :5].copy()}, "weights holds 20 bytes"),
        ({"codes": np.zeros((4, 4, 7), np.uint8)}, "codes holds 112 bytes, expected 128"),
        ({"scales": np.zeros((4, 3), np.float32)}, "scales holds 48 bytes, expected 64"),
        ({"half": True}, "scales holds 64 bytes, expected 32"),
        ({"zero_points": np.zeros((4, 1), np.uint8)}, "zero_points holds 4 bytes, expected 8"),
    ],
)
def test_the_extension_checks_memory_again(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native.quantize_blocks(*{**ARGUMENTS, **changes}.values())
    with pytest.raises((TypeError, BufferError)):
        native.quantize_blocks(*{**ARGUMENTS, "zero_points": None}.values())
