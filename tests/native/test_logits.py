"""Comparison of logits against float64 numpy, and the 16-bit codes against the formula of llama.cpp's file."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgetune_native import _native
from edgetune_native.face import Face
from edgetune_native.results import Comparison

SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.longdouble]:
    wide = logits.astype(np.longdouble)
    wide = wide - wide.max(axis=1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=1, keepdims=True)))


def expected(a: NDArray[np.float32], b: NDArray[np.float32], targets: NDArray[np.int64]) -> Comparison:
    """The definitions, in extended precision."""
    log_p, log_q = log_softmax(a), log_softmax(b)
    with np.errstate(invalid="ignore"):
        terms = np.where(np.exp(log_p) > 0, np.exp(log_p) * (log_p - log_q), 0)
    rows = np.arange(len(a))
    return Comparison(
        terms.sum(axis=1).astype(np.float64),
        a.argmax(axis=1) == b.argmax(axis=1),
        (-log_p[rows, targets]).astype(np.float64),
        (-log_q[rows, targets]).astype(np.float64),
    )


def pair(n: int, v: int, scale: float = 3.0, distance: float = 0.3, seed: int = 0) -> tuple[NDArray[np.float32], ...]:
    rng = np.random.default_rng(seed)
    a = (rng.standard_normal((n, v)) * scale).astype(np.float32)
    return a, (a + rng.standard_normal((n, v)) * distance).astype(np.float32)


def assert_close(found: Comparison, wanted: Comparison) -> None:
    """Rounding of a double sum of v terms of relative error 4e-16, the terms at most some 1e2: 1e-12 has a margin."""
    for name in ("kld", "nll_reference", "nll"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-12, atol=1e-12, err_msg=name)
    assert found.same_top.dtype == np.bool_
    assert np.array_equal(found.same_top, wanted.same_top)


@SETTINGS
@given(
    n=st.integers(1, 40),
    v=st.integers(1, 700),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 3000.0]),
    distance=st.sampled_from([0.0, 1e-4, 0.3, 10.0]),
    threads=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_compare(face: Face, n: int, v: int, scale: float, distance: float, threads: int, seed: int) -> None:
    a, b = pair(n, v, scale, distance, seed)
    targets = np.random.default_rng(seed).integers(0, v, n)
    found = face.compare(a, b, targets, threads=threads)
    # logits of some thousands are themselves known to 1e-4; the definitions on them still agree to the rounding of f64
    wanted = expected(a, b, targets)
    np.testing.assert_allclose(found.kld, wanted.kld, rtol=1e-12, atol=1e-12 * max(1.0, scale))
    np.testing.assert_allclose(found.nll, wanted.nll, rtol=1e-12, atol=1e-12 * max(1.0, scale))
    np.testing.assert_allclose(found.nll_reference, wanted.nll_reference, rtol=1e-12, atol=1e-12 * max(1.0, scale))
    assert np.array_equal(found.same_top, wanted.same_top)


def test_a_real_vocabulary(face: Face) -> None:
    a, b = pair(3, 151_936)
    targets = np.array([0, 77, 151_935], np.int32)
    assert_close(face.compare(a, b, targets), expected(a, b, targets.astype(np.int64)))


def test_equal_rows_and_offsets(face: Face) -> None:
    a, b = pair(4, 1000)
    ids = np.arange(4)
    assert not face.compare(a, a, ids).kld.any()
    log_probs = log_softmax(b).astype(np.float32)
    np.testing.assert_allclose(face.compare(a, log_probs, ids).kld, face.compare(a, b, ids).kld, atol=1e-6)
    # an offset that f32 holds exactly changes nothing but rounding
    coarse = (np.round(a * 64) / 64).astype(np.float32)
    assert face.compare(coarse + np.float32(1024), coarse, ids).kld.max() < 1e-12


def test_minus_infinity(face: Face) -> None:
    a, b = pair(4, 50)
    a[0, 3] = -np.inf  # no mass in the reference: contributes nothing, whatever the other says
    a[1, 3] = b[1, 3] = -np.inf
    b[2, 3] = -np.inf  # mass that the other denies
    a[3, :], b[3, :] = -np.inf, -np.inf
    a[3, 7], b[3, 7] = 2.0, 5.0
    ids = np.array([3, 3, 3, 7])
    found = face.compare(a, b, ids)
    wanted = expected(a[:2], b[:2], ids[:2])
    np.testing.assert_allclose(found.kld[:2], wanted.kld, rtol=1e-12)
    assert found.kld[2] == np.inf
    assert found.kld[3] == 0
    assert found.nll_reference[0] == found.nll[1] == found.nll[2] == np.inf
    assert found.nll_reference[3] == found.nll[3] == 0


def test_the_lowest_of_equal_logits_is_the_top(face: Face) -> None:
    a = np.zeros((3, 600), np.float32)
    b = np.zeros((3, 600), np.float32)
    a[:, [5, 599]] = 1
    b[0, [5, 20]] = 1
    b[1, [4, 5]] = 1
    b[2, 599] = 1
    assert face.compare(a, b, np.zeros(3, np.int64)).same_top.tolist() == [True, False, False]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "row 33 holds a NaN or"), (np.inf, "row 33 holds a NaN or"), (None, "row 33 has no finite")],
)
def test_rows_that_are_no_distribution(face: Face, threads: int, value: float | None, message: str) -> None:
    good, bad = pair(64, 37)
    for row in (33, 34, 60):
        bad[row, 36 if value is not None else slice(None)] = -np.inf if value is None else value
    ids = np.zeros(64, np.int64)
    for call in (
        lambda: face.compare(good, bad, ids, threads=threads),
        lambda: face.compare(bad, good, ids, threads=threads),
        lambda: face.encode_log_probs(bad, threads=threads),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_no_rows(face: Face) -> None:
    empty = np.empty((0, 5), np.float32)
    assert all(len(part) == 0 for part in face.compare(empty, empty, np.empty(0, np.int64)))
    assert all(len(part) == 0 for part in face.encode_log_probs(empty))
    assert face.decode_log_probs(*face.encode_log_probs(empty)).shape == (0, 5)


def test_every_instruction_set_and_thread_count_gives_the_same_bits(compiled: Face, isas: tuple[str, ...]) -> None:
    a, b = pair(70, 3001)
    ids = np.arange(70)
    results = []
    for isa in isas:
        _native.use_isa(isa)
        assert compiled.cpu().isa == isa
        for threads in (1, 2, 5):
            parts = (*compiled.compare(a, b, ids, threads=threads), *compiled.encode_log_probs(a, threads=threads))
            results.append(b"".join(part.tobytes() for part in parts))
    assert len(set(results)) == 1


def test_the_exponential_over_its_whole_range(compiled: Face) -> None:
    """Row (0, x): nll of the first is log1p(exp(x)), which shows exp(x) to the last bits of a double."""
    x = -np.concatenate([np.linspace(0, 40, 200_001), np.geomspace(1e-30, 700, 20_001)]).astype(np.float32)
    rows = np.stack([np.zeros_like(x), x], axis=1)
    found = compiled.compare(rows, rows, np.zeros(len(x), np.int64)).nll
    exact = np.log(1 + np.exp(x.astype(np.float64)))
    np.testing.assert_allclose(found, exact, rtol=0, atol=3e-16)


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
def test_encode_is_the_formula(face: Face, v: int, scale: float, seed: int) -> None:
    logits, _ = pair(2, v, scale, seed=seed)
    if v > 3:
        logits[0, 1] = -np.inf
    stored = face.encode_log_probs(logits)
    for row in range(2):
        head, codes = llama_row(logits[row])
        wanted_scale, wanted_min = struct.unpack("<ff", head)
        assert stored.scale[row] == wanted_scale
        # one unit in the last place for the library's expf; everything else is the same operation
        assert abs(stored.min_log_prob[row] - wanted_min) <= np.spacing(np.float32(abs(wanted_min)))
        assert np.array_equal(stored.codes[row], codes)


def test_round_trip(face: Face) -> None:
    logits, _ = pair(20, 5000, scale=4.0)
    stored = face.encode_log_probs(logits)
    decoded = face.decode_log_probs(*stored)
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
    assert face.compare(logits, decoded, ids).kld.max() < 5000 * np.exp(-16.0)
    flatter = logits / np.float32(3)  # within 16 nats: only the rounding is left
    assert face.compare(flatter, face.decode_log_probs(*face.encode_log_probs(flatter)), ids).kld.max() < 1e-8


@pytest.mark.parametrize("difference", [0.0, 1e-45, 1e-40, 1e-36])
def test_flat_rows(face: Face, difference: float) -> None:
    logits = np.zeros((2, 9), np.float32)
    logits[:, 4] = difference
    stored = face.encode_log_probs(logits)
    assert np.isfinite(stored.scale).all()
    np.testing.assert_allclose(face.decode_log_probs(*stored), np.full((2, 9), -np.log(9)), rtol=1e-6)
