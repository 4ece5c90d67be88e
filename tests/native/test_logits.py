"""Comparison of logits against float64 numpy, and the 16-bit codes against the formula of llama.cpp's file."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgetune_native.results import Comparison
from tests.native.backends import Backend, native
from tests.profiles import scaled

SETTINGS = settings(max_examples=scaled(0.5))


def log_softmax(logits: NDArray[Any]) -> NDArray[np.longdouble]:
    wide = logits.astype(np.longdouble)
    wide = wide - wide.max(axis=1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=1, keepdims=True)))


def kl(log_p: NDArray[np.longdouble], log_q: NDArray[np.longdouble]) -> NDArray[np.longdouble]:
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(p > 0, p * (log_p - log_q), 0).sum(axis=1))


def largest(rows: NDArray[np.float32], k: int) -> list[set[int]]:
    return [set(np.argsort(-row, kind="stable")[:k].tolist()) for row in rows]


def expected(a: NDArray[Any], b: NDArray[Any], targets: NDArray[np.int64], k: int = 10) -> Comparison:
    """The definitions, in extended precision."""
    log_p, log_q = log_softmax(a), log_softmax(b)
    rows, k = np.arange(len(a)), min(k, a.shape[1])
    return Comparison(
        kl(log_p, log_q).astype(np.float64),
        a.argmax(axis=1) == b.argmax(axis=1),
        (-log_p[rows, targets]).astype(np.float64),
        (-log_q[rows, targets]).astype(np.float64),
        kl(log_q, log_p).astype(np.float64),
        kl(log_p, np.zeros_like(log_p)).astype(np.float64) * -1,
        kl(log_q, np.zeros_like(log_q)).astype(np.float64) * -1,
        np.array([len(x & y) / k for x, y in zip(largest(a, k), largest(b, k), strict=True)]),
    )


def pair(n: int, v: int, scale: float = 3.0, distance: float = 0.3, seed: int = 0) -> tuple[NDArray[np.float32], ...]:
    rng = np.random.default_rng(seed)
    a = (rng.standard_normal((n, v)) * scale).astype(np.float32)
    return a, (a + rng.standard_normal((n, v)) * distance).astype(np.float32)


def spread(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """sqrt(E x^2) under the row's softmax, x the distance from the largest, and 1: the kernel's origin is near that."""
    shifted = rows.astype(np.float64) - rows.max(axis=1, keepdims=True)
    finite = np.where(shifted > -700, shifted, 0)
    p = np.where(shifted > -700, np.exp(finite), 0)
    p /= p.sum(axis=1, keepdims=True)
    return np.asarray(np.sqrt((p * finite**2).sum(axis=1)) + 1)


def assert_close(found: Comparison, wanted: Comparison, a: NDArray[np.float32], b: NDArray[np.float32]) -> None:
    """Hold the kernel to the bounds that native/src/compare_kernel.c derives; the reference backend is far inside them.

    With h = 2^-24, M the spread of the row and X that of both under the one whose divergence it is: log-sum-exp within
    2.2e-6 + 1.35e-7 M (its own rounding, f32 sums of 32 terms); entropy that times 1 + 2 M; a divergence K within
    5 (7e-6 + 3e-6 X) K + sqrt(2 K) h X + (h X)^2 + 1e-14. The logits themselves are exact.
    """
    h = 2.0**-24
    for name, rows, factor in (("reference", a, 0), ("", b, 0), ("reference", a, 2), ("", b, 2)):
        field = ("entropy" if factor else "nll") + ("_" + name if name else "")
        bound = (2.2e-6 + 1.35e-7 * spread(rows)) * (1 + factor * spread(rows))
        got, want = getattr(found, field), getattr(wanted, field)
        finite = np.isfinite(want)
        assert np.array_equal(got[~finite], want[~finite])
        assert (np.abs(got[finite] - want[finite]) <= (bound + 1e-12 * np.abs(want))[finite]).all(), field
    x = cross_spread(a, b)
    for field, far in (("kld", x[0]), ("reverse_kld", x[1])):
        got, want = getattr(found, field), getattr(wanted, field)
        finite = np.isfinite(want)
        assert np.array_equal(got[~finite], want[~finite])
        want = np.where(finite, np.maximum(want, 0), 0)
        got = np.where(finite, got, 0)
        bound = 5 * (7e-6 + 3e-6 * far) * want + np.sqrt(2 * want) * h * far + (h * far) ** 2 + 1e-14
        assert (np.abs(got[finite] - want[finite]) <= bound[finite]).all(), (field, got, want, bound)
    assert found.same_top.dtype == np.bool_
    assert np.array_equal(found.same_top, wanted.same_top)
    assert np.array_equal(found.top_k_overlap, wanted.top_k_overlap)


def cross_spread(a: NDArray[np.float32], b: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """sqrt(E (|x| + |y|)^2) under each of the two rows, and 25 because y's origin may be that far from the largest."""
    shifted = [rows.astype(np.float64) - rows.max(axis=1, keepdims=True) for rows in (a, b)]
    total = np.minimum(np.abs(shifted[0]), 1e5) + np.minimum(np.abs(shifted[1]), 1e5)
    found = []
    for each in shifted:
        p = np.exp(np.maximum(each, -700))
        p /= p.sum(axis=1, keepdims=True)
        found.append(np.sqrt((p * total**2).sum(axis=1)) + 25)
    return found[0], found[1]


DTYPES: dict[str, Callable[[NDArray[np.float32]], NDArray[Any]]] = {
    "f32": lambda rows: rows,
    "f16": lambda rows: np.clip(rows, -6e4, 6e4).astype(np.float16),
    "bf16": lambda rows: (rows.view(np.uint32) >> 16).astype(np.uint16),
}


def floats(rows: NDArray[Any]) -> NDArray[np.float32]:
    if rows.dtype == np.uint16:
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float32)


@SETTINGS
@given(
    n=st.integers(1, 20),
    v=st.integers(1, 700) | st.sampled_from([8191, 8192, 8193, 9000, 16_400]),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 3000.0]),
    distance=st.sampled_from([0.0, 1e-4, 0.3, 10.0]),
    k=st.sampled_from([1, 3, 10, 1000]),
    dtypes=st.tuples(st.sampled_from(sorted(DTYPES)), st.sampled_from(sorted(DTYPES))),
    threads=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_compare_is_its_definition(
    backend: Backend,
    n: int,
    v: int,
    scale: float,
    distance: float,
    k: int,
    dtypes: tuple[str, str],
    threads: int,
    seed: int,
) -> None:
    a, b = (DTYPES[dtype](rows) for dtype, rows in zip(dtypes, pair(n, v, scale, distance, seed), strict=True))
    targets = np.random.default_rng(seed).integers(0, v, n)
    found = backend.compare(a, b, targets, top_k=k, threads=threads)
    assert_close(found, expected(floats(a), floats(b), targets, k), floats(a), floats(b))
    assert (found.kld >= 0).all()
    assert (found.reverse_kld >= 0).all()


@SETTINGS
@given(
    v=st.integers(1, 300),
    masked=st.floats(0, 1),
    levels=st.integers(1, 6),
    k=st.integers(1, 40),
    seed=st.integers(0, 10_000),
)
def test_ties_and_minus_infinity(backend: Backend, v: int, masked: float, levels: int, k: int, seed: int) -> None:
    """Few values, so that most are equal, and -inf in either row: the definitions hold to the letter."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, levels, (2, 3, v)).astype(np.float32)
    rows[rng.random(rows.shape) < masked] = -np.inf
    rows[:, :, rng.integers(0, v)] = 1.0
    targets = rng.integers(0, v, 3)
    found = backend.compare(rows[0], rows[1], targets, top_k=k)
    assert_close(found, expected(rows[0], rows[1], targets, k), rows[0], rows[1])


@SETTINGS
@given(v=st.integers(1, 200), dtype=st.sampled_from(["f32", "f16", "bf16"]), seed=st.integers(0, 10_000))
def test_any_bits_are_refused_or_give_numbers_that_are_not_negative(
    backend: Backend, v: int, dtype: str, seed: int
) -> None:
    """Whatever the bits: refused as a NaN or infinity, or numbers that are not negative."""
    bits = np.random.default_rng(seed).integers(0, 1 << (32 if dtype == "f32" else 16), (2, 2, v))
    kind = {"f32": np.uint32, "f16": np.uint16, "bf16": np.uint16}[dtype]
    view = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}[dtype]
    a, b = bits.astype(kind).view(view)
    values = [floats(rows) for rows in (a, b)]
    legal = all(not np.isnan(rows).any() and (np.isfinite(rows.max(axis=1))).all() for rows in values)
    with np.errstate(over="ignore", invalid="ignore"):
        if not legal:
            with pytest.raises(ValueError, match=r"row [01] (has|contains) "):
                backend.compare(a, b, np.zeros(2, np.int64))
            return
        found = backend.compare(a, b, np.zeros(2, np.int64))
    for field in ("kld", "reverse_kld", "nll", "nll_reference", "entropy", "entropy_reference", "top_k_overlap"):
        assert (getattr(found, field) >= 0).all(), field
    assert np.array_equal(found.same_top, values[0].argmax(axis=1) == values[1].argmax(axis=1))


@pytest.mark.parametrize("distance", [3e-6, 4.5e-5, 1e-3, 0.1, 1.0])
@pytest.mark.parametrize("offset", [0.0, 17.3])
def test_small_divergences_do_not_cancel(backend: Backend, distance: float, offset: float) -> None:
    """A KLD of some 1e-11, 1e-9, ... of a real vocabulary is right to 1e-3 of itself, whatever the rows' offset."""
    rng = np.random.default_rng(5)
    a = (3 * rng.standard_normal((4, 50_000))).astype(np.float32)
    b = (a + distance * rng.standard_normal(a.shape) - offset).astype(np.float32)
    ids = np.zeros(4, np.int64)
    wanted = expected(a, b, ids)
    found = backend.compare(a, b, ids)
    tolerance = 1e-3 if distance > 1e-5 else 5e-3
    np.testing.assert_allclose(found.kld, wanted.kld, rtol=tolerance)
    np.testing.assert_allclose(found.reverse_kld, wanted.reverse_kld, rtol=tolerance)
    if distance >= 1e-3:
        np.testing.assert_allclose(found.kld, wanted.kld, rtol=3e-6)


def test_a_row_whose_largest_come_last(backend: Backend) -> None:
    """Ascending logits move the origins at every block, by much and by little; so do two humps far apart."""
    v = 30_000
    for top in (1.0, 50.0, 5000.0):
        a = np.linspace(-top, top, v, dtype=np.float32)[None].repeat(3, 0)
        a[1] = -np.abs(a[0] - top / 2) * 3
        a[2] = np.where(np.arange(v) < v // 2, -a[0], a[0] - 0.25)
        b = np.ascontiguousarray((a * np.float32(0.99))[:, ::-1] if top == 50.0 else a * np.float32(0.99))
        ids = np.array([0, v - 1, v // 2])
        assert_close(backend.compare(a, b, ids), expected(a, b, ids), a, b)


def test_what_a_late_block_brings(backend: Backend) -> None:
    """Rows near each other at first, and then not; -inf, large logits and what is no logit only in the last block."""
    a, b = pair(6, 20_000, 2.0, 0.01)
    late = 19_990
    b[0, late] += 3
    a[1, late] = b[1, late] = 60
    a[2, late], b[2, late] = 40, -4000
    a[3, late] = b[4, late] = -np.inf
    a[5, late], b[5, late] = -1e30, 20
    ids = np.full(6, late)
    found = backend.compare(a, b, ids)
    kept = [0, 1, 2, 3, 4]
    assert_close(
        Comparison._make(part[kept] for part in found), expected(a[kept], b[kept], ids[kept]), a[kept], b[kept]
    )
    assert found.reverse_kld[5] > 1e18
    for value in (np.nan, np.inf):
        a[2, late] = value
        for pair_ in ((a, b), (b, a)):
            with pytest.raises(ValueError, match="row 2 contains NaN"):
                backend.compare(*pair_, ids)


def test_a_real_vocabulary(backend: Backend) -> None:
    a, b = pair(3, 151_936)
    targets = np.array([0, 77, 151_935], np.int32)
    assert_close(backend.compare(a, b, targets), expected(a, b, targets.astype(np.int64)), a, b)


def test_equal_rows_and_offsets(backend: Backend) -> None:
    a, b = pair(4, 1000)
    ids = np.arange(4)
    for far in (a, a * np.float32(1000), a + np.float32(0.1)):
        found = backend.compare(far, far, ids)
        assert not found.kld.any()
        assert not found.reverse_kld.any()
        assert (found.top_k_overlap == 1).all()
        assert np.array_equal(found.entropy, found.entropy_reference)
    log_probs = log_softmax(b).astype(np.float32)
    np.testing.assert_allclose(backend.compare(a, log_probs, ids).kld, backend.compare(a, b, ids).kld, atol=1e-6)
    # an offset that f32 holds exactly changes nothing but rounding
    coarse = (np.round(a * 64) / 64).astype(np.float32)
    assert backend.compare(coarse + np.float32(1024), coarse, ids).kld.max() < 1e-12


def test_minus_infinity_means_no_probability(backend: Backend) -> None:
    a, b = pair(4, 50)
    a[0, 3] = -np.inf  # no mass in the reference: contributes nothing, whatever the other says
    a[1, 3] = b[1, 3] = -np.inf
    b[2, 3] = -np.inf  # mass that the other denies
    a[3, :], b[3, :] = -np.inf, -np.inf
    a[3, 7], b[3, 7] = 2.0, 5.0
    ids = np.array([3, 3, 3, 7])
    found = backend.compare(a, b, ids)
    wanted = expected(a[:2], b[:2], ids[:2])
    np.testing.assert_allclose(found.kld[:2], wanted.kld, rtol=1e-5)
    assert found.kld[2] == np.inf
    assert found.kld[3] == 0
    np.testing.assert_allclose(found.reverse_kld[1:3], expected(b[1:3], a[1:3], ids[1:3]).kld, rtol=1e-5)
    assert found.reverse_kld[0] == np.inf
    assert found.reverse_kld[3] == found.entropy[3] == found.entropy_reference[3] == 0
    assert found.nll_reference[0] == found.nll[1] == found.nll[2] == np.inf
    assert found.nll_reference[3] == found.nll[3] == 0


def test_the_lowest_of_equal_logits_is_the_top(backend: Backend) -> None:
    a = np.zeros((3, 600), np.float32)
    b = np.zeros((3, 600), np.float32)
    a[:, [5, 599]] = 1
    b[0, [5, 20]] = 1
    b[1, [4, 5]] = 1
    b[2, 599] = 1
    assert backend.compare(a, b, np.zeros(3, np.int64)).same_top.tolist() == [True, False, False]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "row 33 contains NaN or"), (np.inf, "row 33 contains NaN or"), (None, "row 33 has no finite")],
)
def test_rows_that_are_no_distribution(backend: Backend, threads: int, value: float | None, message: str) -> None:
    good, bad = pair(64, 37)
    for row in (33, 34, 60):
        bad[row, 36 if value is not None else slice(None)] = -np.inf if value is None else value
    ids = np.zeros(64, np.int64)
    arguments = {"compare": (good, bad, ids), "encode_log_probs": (bad,)}
    for name, rows in [*arguments.items(), ("compare", (bad, good, ids))]:
        with pytest.raises(ValueError, match=message):
            getattr(backend, name)(*rows, threads=threads)


def test_no_rows_give_no_results(backend: Backend) -> None:
    empty = np.empty((0, 5), np.float32)
    assert all(len(part) == 0 for part in backend.compare(empty, empty, np.empty(0, np.int64)))
    assert all(len(part) == 0 for part in backend.encode_log_probs(empty))
    assert backend.decode_log_probs(*backend.encode_log_probs(empty)).shape == (0, 5)


def test_every_instruction_set_and_thread_count_gives_the_same_bits(compiled: Backend, isas: tuple[str, ...]) -> None:
    a, b = pair(70, 3001)
    a[3, 5] = b[4, 6] = -np.inf
    a[5] *= 1000
    ids = np.arange(70)
    brain, half = DTYPES["bf16"](a), DTYPES["f16"](b)
    long_a, long_b = pair(2, 40_000, 8.0)
    results = []
    for isa in isas:
        native.use_isa(isa)
        assert compiled.cpu().isa == isa
        for threads in (1, 2, 5):
            parts = (
                *compiled.compare(a, b, ids, threads=threads),
                *compiled.compare(brain, half, ids, top_k=100, threads=threads),
                *compiled.compare(long_a, long_b, ids[:2], threads=threads),
                *compiled.encode_log_probs(a, threads=threads),
                *compiled.encode_log_probs(brain, threads=threads),
            )
            results.append(b"".join(part.tobytes() for part in parts))
    assert len(set(results)) == 1


def test_the_exponential_over_its_whole_range(compiled: Backend) -> None:
    """Row (0, x): nll of the first is log1p(exp(x)), which shows exp(x): the bound of e in compare_kernel.c, times e,
    and the rounding of 1 + e in f32."""
    x = -np.concatenate([np.linspace(0, 40, 200_001), np.geomspace(1e-30, 700, 20_001)]).astype(np.float32)
    rows = np.stack([np.zeros_like(x), x], axis=1)
    found = compiled.compare(rows, rows, np.zeros(len(x), np.int64)).nll
    e = np.exp(x.astype(np.float64))
    assert (np.abs(found - np.log1p(e)) <= e * (2.2e-7 + 1.35e-7 * -x) + np.minimum(6e-8, e) + 1e-15).all()


# --- codes -----------------------------------------------------------------------------------------------------------


def llama_row(logits: NDArray[np.float32]) -> tuple[bytes, NDArray[np.uint16]]:
    """One row as perplexity.cpp writes it (scalar and literal): the bytes of the two floats, and the codes."""
    one = np.float32
    top, low = logits.max(), logits.min()
    low = max(low, one(top - one(16)))
    sum_exp = 0.0
    for logit in logits:
        sum_exp += float(np.exp(one(logit - top)))
    log_sum_exp = one(np.log(sum_exp))
    min_log_prob = one(one(low - top) - log_sum_exp)
    scale = one(one(top - low) / one(65535))
    codes = np.zeros(len(logits), np.uint16)
    if scale:
        inverse = one(one(1) / scale)
        for i, logit in enumerate(logits):
            if logit > low:
                (bits,) = struct.unpack("<i", struct.pack("<f", one(one(inverse * one(logit - low)) + one(12582912.0))))
                codes[i] = (bits & 0x007FFFFF) - 0x00400000
    return struct.pack("<ff", scale, min_log_prob), codes


@SETTINGS
@given(v=st.integers(1, 200), scale=st.sampled_from([0.0, 1e-3, 1.0, 8.0, 100.0]), seed=st.integers(0, 1000))
def test_encode_is_the_formula(backend: Backend, v: int, scale: float, seed: int) -> None:
    logits, _ = pair(2, v, scale, seed=seed)
    if v > 3:
        logits[0, 1] = -np.inf
    stored = backend.encode_log_probs(logits)
    for row in range(2):
        head, codes = llama_row(logits[row])
        wanted_scale, wanted_min = struct.unpack("<ff", head)
        assert stored.scale[row] == wanted_scale
        # one unit in the last place for the library's expf; everything else is the same operation
        assert abs(stored.min_log_prob[row] - wanted_min) <= np.spacing(np.float32(abs(wanted_min)))
        assert np.array_equal(stored.codes[row], codes)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_encode_of_halves_is_that_of_their_values(backend: Backend, dtype: str) -> None:
    rows = DTYPES[dtype](pair(5, 777, scale=6.0)[0])
    found, wanted = backend.encode_log_probs(rows), backend.encode_log_probs(floats(rows))
    assert np.array_equal(found.scale, wanted.scale)
    assert np.array_equal(found.min_log_prob, wanted.min_log_prob)
    assert np.array_equal(found.codes, wanted.codes)


def test_decoding_gives_the_stored_values_back(backend: Backend) -> None:
    logits, _ = pair(20, 5000, scale=4.0)
    stored = backend.encode_log_probs(logits)
    decoded = backend.decode_log_probs(*stored)
    assert np.array_equal(
        decoded, stored.scale[:, None] * stored.codes.astype(np.float32) + stored.min_log_prob[:, None]
    )
    exact = log_softmax(logits)
    kept = exact > exact.max(axis=1, keepdims=True) - 15.9
    error = np.abs(np.where(kept, decoded - exact, 0)).max(axis=1)
    assert (error < stored.scale * 0.5 + 1e-5).all()
    assert stored.codes.max() == 65535
    # What the coding alone costs: the floor of 16 nats gives mass exp(-16) times the largest to each entry below it.
    ids = np.zeros(20, np.int64)
    assert backend.compare(logits, decoded, ids).kld.max() < 5000 * np.exp(-16.0)
    flatter = logits / np.float32(3)  # within 16 nats: only the rounding is left
    assert backend.compare(flatter, backend.decode_log_probs(*backend.encode_log_probs(flatter)), ids).kld.max() < 1e-8


@pytest.mark.parametrize("difference", [0.0, 1e-45, 1e-40, 1e-36])
def test_flat_rows_are_encoded_with_a_finite_scale(backend: Backend, difference: float) -> None:
    logits = np.zeros((2, 9), np.float32)
    logits[:, 4] = difference
    stored = backend.encode_log_probs(logits)
    assert np.isfinite(stored.scale).all()
    np.testing.assert_allclose(backend.decode_log_probs(*stored), np.full((2, 9), -np.log(9)), rtol=1e-6)
