"""Logits of chosen positions, and how far two sets of them may be apart."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgetune.runtime import Runtime
from tests.converters import tiny

PROMPT = tiny.random_ids(20)


def scored(runtime: Runtime, ids: list[int], positions: list[int]) -> NDArray[np.float32]:
    blocks = runtime.score(np.array(ids, np.int32), np.array(positions, np.int64))
    return np.concatenate([block.copy() for block in blocks])


def assert_same(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """Equal up to the order of the sums in llama.cpp's 16-bit attention."""
    assert found.shape == expected.shape
    assert tiny.divergence(expected, found)[0] < 1e-4
    np.testing.assert_allclose(found, expected, atol=0.1)
