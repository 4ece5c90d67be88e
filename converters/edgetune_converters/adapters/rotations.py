"""Rotations of the inputs of a layer, as OFT and BOFT make them: orthogonal matrices of blocks along the diagonal."""

from __future__ import annotations

import numpy as np

from edgetune_converters.adapters.products import matrix_product
from edgetune_converters.tensors import F32

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


def multiplied_by_blocks(rows: F32, blocks: F32) -> F32:
    """Return rows [n, k] @ the block-diagonal matrix of `blocks` [k / b, b, b]; one block serves for all."""
    size = blocks.shape[-1]
    found = np.empty(rows.shape, np.float32)
    for number in range(rows.shape[1] // size):
        own = slice(number * size, (number + 1) * size)
        found[:, own] = matrix_product(rows[:, own], blocks[number % len(blocks)])
    return found
