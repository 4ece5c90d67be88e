"""rows + left @ right: exact results, and the same bits on each instruction set, thread count and backend."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.native.backends import COMPILED, REFERENCE, Backend, native
from tests.pairwise import pairwise

SHAPES = [(1, 1, 1), (3, 5, 63), (4, 16, 64), (5, 16, 65), (9, 1, 200), (130, 17, 1111), (2, 0, 70), (0, 3, 5)]


def _bf16(rows: NDArray[np.float32]) -> NDArray[np.uint16]:
    return (rows.view(np.uint32) >> 16).astype(np.uint16)


STORED: dict[str, Callable[[NDArray[np.float32]], NDArray[Any]]] = {
    "f32": lambda rows: rows,
    "f16": lambda rows: rows.astype(np.float16),
    "bf16": _bf16,
}


def _inputs(n: int, r: int, k: int, seed: int) -> tuple[NDArray[np.float32], ...]:
    rng = np.random.default_rng(seed)
    sizes = np.float32(10) ** rng.integers(-12, 3, (n, 1)).astype(np.float32)  # so that roundings matter, or do not
    left = rng.standard_normal((n, r), np.float32) * sizes
    return rng.standard_normal((n, k), np.float32), left, rng.standard_normal((r, k), np.float32)


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("shape", SHAPES)
def test_everyone_gives_the_same_bits(shape: tuple[int, int, int], dtype: str, isas: tuple[str, ...]) -> None:
    rows, left, right = _inputs(*shape, seed=sum(shape))
    stored = STORED[dtype](rows)
    wanted = REFERENCE.add_product(stored, left, right)
    for isa in isas:
        native.use_isa(isa)
        for threads in (1, 3):
            found = COMPILED.add_product(stored, left, right, threads=threads)
            np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32), err_msg=isa)


def test_it_is_the_chain_that_is_promised() -> None:
    rows, left, right = _inputs(7, 9, 33, seed=1)
    fmaf = ctypes.CDLL("libm.so.6").fmaf
    fmaf.argtypes, fmaf.restype = [ctypes.c_float] * 3, ctypes.c_float
    found = COMPILED.add_product(rows, left, right)
    for i, j in np.ndindex(rows.shape):
        total = 0.0
        for step in range(9):
            total = fmaf(left[i, step], right[step, j], total)
        assert found[i, j] == rows[i, j] + np.float32(total)


@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 140), st.integers(0, 2**32))
def test_it_is_near_the_exact_product(n: int, r: int, k: int, seed: int) -> None:
    """Each of r steps and the addition rounds by half a unit of 2^-23 of what is there by then."""
    rows, left, right = _inputs(n, r, k, seed)
    exact = rows.astype(np.float64) + left.astype(np.float64) @ right.astype(np.float64)
    size = np.abs(rows) + np.abs(left).astype(np.float64) @ np.abs(right).astype(np.float64)
    assert (np.abs(COMPILED.add_product(rows, left, right) - exact) <= (r + 1) * 2.0**-24 * size).all()


def test_inputs_are_not_changed(backend: Backend) -> None:
    rows, left, right = _inputs(5, 4, 70, seed=2)
    before = [each.copy() for each in (rows, left, right)]
    backend.add_product(rows, left, right)
    assert all(np.array_equal(a, b) for a, b in zip(before, (rows, left, right), strict=True))


@pairwise(dtype=STORED, value=[np.nan, np.inf, -np.inf], at=[(0, 0), (700, 69), (999, 12)])
def test_what_is_not_finite_is_named(backend: Backend, dtype: str, value: float, at: tuple[int, int]) -> None:
    rows, left, right = _inputs(1000, 2, 70, seed=3)
    rows[at] = value
    with pytest.raises(ValueError, match=f"row {at[0]} holds a NaN or an infinity"):
        backend.add_product(STORED[dtype](rows), left, right)


def test_a_sum_that_overflows_is_refused(backend: Backend) -> None:
    rows, left, right = np.full((3, 64), 3e38, np.float32), np.zeros((3, 1), np.float32), np.ones((1, 64), np.float32)
    left[2] = 1e38
    with pytest.raises(ValueError, match="row 2 holds"):
        backend.add_product(rows, left, right)


def test_subnormal_numbers_are_kept(backend: Backend) -> None:
    tiny = np.full((1, 64), 1e-23, np.float32)
    found = backend.add_product(np.zeros((1, 64), np.float32), tiny[:, :1], tiny)
    assert 0 < found.max() < 2e-45 or found.max() == 0
    left = np.full((1, 1), 1e-20, np.float32)
    assert backend.add_product(np.zeros((1, 64), np.float32), left, left.repeat(64, 1))[0, 0] == np.float32(1e-40)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rows": np.ones((4, 8))}, TypeError, "rows has dtype float64"),
        ({"left": np.ones((3, 2), np.float32)}, ValueError, r"left has shape \(3, 2\), expected \(4, any\)"),
        ({"left": np.ones((4, 2))}, TypeError, "left has dtype float64"),
        ({"right": np.ones((3, 8), np.float32)}, ValueError, r"right has shape \(3, 8\), expected \(2, 8\)"),
        ({"right": np.ones((8, 2), np.float32).T}, ValueError, "right is not C-contiguous"),
        ({"threads": -1}, ValueError, "threads is -1"),
    ],
)
def test_wrong_arguments_are_refused(
    backend: Backend, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {
        "rows": np.ones((4, 8), np.float32),
        "left": np.ones((4, 2), np.float32),
        "right": np.ones((2, 8), np.float32),
    }
    with pytest.raises(error, match=message):
        backend.add_product(**{**arguments, **changes})
