"""Products of two small factors in place of a matrix, by singular values."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from edgetune_converters.tensors import F32

_WHOLE = 512  # up to this many rows or columns, all singular values are computed
_FURTHER = 10  # columns beyond the rank, and passes over the matrix: the usual choice for a slow decay
_PASSES = 4
_ROWS = 256  # compared at a time


class LowRank(NamedTuple):
    """Factors left [n, r], right [r, k], and the squares of the norms of the matrix and of what they leave out."""

    left: F32
    right: F32
    norm: float
    error: float


def low_rank(matrix: F32, rank: int) -> LowRank:
    """Return the factors of a matrix [n, k] of at most this rank that leave out least.

    Large matrices: randomized subspace iteration from fixed numbers (Halko, Martinsson, Tropp 2011, algorithm 4.4),
    whose error is that of the best factors or slightly above; it is measured, not estimated.
    """
    n, k = matrix.shape
    rank = min(rank, n, k)
    if min(n, k) <= _WHOLE:
        u, values, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    else:
        space = np.linalg.qr(matrix @ _start(k, min(rank + _FURTHER, n, k)))[0]
        for _ in range(_PASSES):
            space = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ space)[0])[0]
        inner, values, v = np.linalg.svd(space.T @ matrix, full_matrices=False)
        u = space @ inner
    roots = np.sqrt(values[:rank])
    left, right = (u[:, :rank] * roots).astype(np.float32), (roots[:, None] * v[:rank]).astype(np.float32)
    blocks = [slice(first, min(first + _ROWS, n)) for first in range(0, n, _ROWS)]
    norm = sum(float(np.square(matrix[block], dtype=np.float64).sum()) for block in blocks)
    error = sum(float(np.square(matrix[block] - left[block] @ right, dtype=np.float64).sum()) for block in blocks)
    return LowRank(np.ascontiguousarray(left), np.ascontiguousarray(right), norm, error)


def of_product(left: F32, right: F32, rank: int) -> LowRank:
    """Return factors of at most this rank for a product left [n, r] @ right [r, k] of a higher one."""
    first, upper = np.linalg.qr(left.astype(np.float64))
    second, lower = np.linalg.qr(right.T.astype(np.float64))
    u, values, v = np.linalg.svd(upper @ lower.T)
    roots = np.sqrt(values[:rank])
    return LowRank(
        np.ascontiguousarray((first @ u[:, :rank] * roots).astype(np.float32)),
        np.ascontiguousarray((roots[:, None] * (v[:rank] @ second.T)).astype(np.float32)),
        float(np.square(values).sum()),
        float(np.square(values[rank:]).sum()),
    )


def best_factors(matrix: F32, rank: int) -> tuple[F32, F32]:
    """Return left [n, r] and right [r, k], the product of at most this rank that is nearest to a matrix [n, k].

    The singular vectors of the shorter side are the eigenvectors of a square matrix of that size: exact, and slower for
    large matrices than `low_rank`.
    """
    n, k = matrix.shape
    wide = matrix.astype(np.float64)
    square = wide.T @ wide if k <= n else wide @ wide.T
    vectors = np.linalg.eigh(square)[1][:, ::-1][:, :rank]  # eigenvalues rise
    left, right = (wide @ vectors, vectors.T) if k <= n else (vectors, vectors.T @ wide)
    return np.ascontiguousarray(left.astype(np.float32)), np.ascontiguousarray(right.astype(np.float32))


def _start(rows: int, columns: int) -> F32:
    return np.random.default_rng(0).standard_normal((rows, columns), np.float32)
