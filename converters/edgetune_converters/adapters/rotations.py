"""Rotations of the inputs of a layer, as OFT and BOFT make them: orthogonal matrices of blocks along the diagonal."""

from __future__ import annotations

import numpy as np

from edgetune_converters.adapters.products import matrix_product
from edgetune_converters.tensors import F32

_JOINED = 64  # columns of the blocks that small ones are joined to
_TOO_FEW = 2  # terms of the Neumann series below which it is the identity


def cayley(skew: F32) -> F32:
    """Return (I - Q) (I + Q)^-1 of each skew-symmetric matrix [blocks, b, b]; solved in f64."""
    wide = skew.astype(np.float64)
    one = np.eye(wide.shape[-1])
    # X (I + Q) = I - Q, transposed
    solved = np.linalg.solve((one + wide).transpose(0, 2, 1), (one - wide).transpose(0, 2, 1))
    rotations: F32 = solved.transpose(0, 2, 1).astype(np.float32)
    return rotations


def cayley_neumann(skew: F32, terms: int) -> F32:
    """Return the approximation I + 2 Q + 2 Q^2 + ... + Q^(terms - 1) of `cayley` with the signs of PEFT.

    The last power has the factor 1, the others 2. Source: PEFT, tuners/oft/layer.py.
    """
    wide = skew.astype(np.float64)
    total = np.broadcast_to(np.eye(wide.shape[-1]), wide.shape).copy()
    if terms >= _TOO_FEW:
        total += 2 * wide
    if terms > _TOO_FEW:
        power = wide @ wide
        total += 2 * power
        for _ in range(3, terms - 1):
            power = power @ wide
            total += 2 * power
        total += power @ wide
    rotations: F32 = total.astype(np.float32)
    return rotations


def skew_symmetric(upper: F32, size: int) -> F32:
    """Return matrices [blocks, size, size] of their elements above the diagonal [blocks, size (size - 1) / 2]."""
    found = np.zeros((len(upper), size, size), np.float32)
    rows, columns = np.triu_indices(size, 1)
    found[:, rows, columns] = upper
    found[:, columns, rows] = -upper
    return found


def joined_blocks(blocks: F32, width: int) -> list[F32]:
    """Return the blocks of a block-diagonal matrix [width, width], small ones joined: one product costs as much then.

    One block of `blocks` [count, b, b] serves for all.
    """
    size = blocks.shape[-1]
    count, several = width // size, max(1, _JOINED // size)
    found = []
    for first in range(0, count, several):
        numbers = range(first, min(first + several, count))
        one = np.zeros((len(numbers) * size,) * 2, np.float32)
        for place, number in enumerate(numbers):
            own = slice(place * size, (place + 1) * size)
            one[own, own] = blocks[number % len(blocks)]
        found.append(one)
    return found


def multiplied_by_blocks(rows: F32, blocks: list[F32]) -> F32:
    """Return rows [n, k] @ the block-diagonal matrix of `blocks`, [b, b] each."""
    found = np.empty(rows.shape, np.float32)
    first = 0
    for block in blocks:
        own = slice(first, first + len(block))
        # the blocks of rows already go through several threads
        found[:, own] = matrix_product(rows[:, own], block, threads=1)
        first += len(block)
    return found
