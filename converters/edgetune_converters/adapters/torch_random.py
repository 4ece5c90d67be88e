"""What torch draws for a seed on the CPU: some adapters store the seed alone.

torch's generator on the CPU is MT19937, seeded as NumPy seeds it from an integer. torch.randperm exchanges each place
with a later one, so the first places are final after as many steps. Source: PyTorch, aten/src/ATen/native/cpu and
TensorFactories.cpp (randperm_cpu), aten/src/ATen/core/TransformationHelper.h (uniform_real, bernoulli).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.tensors import F32

_SMALL = (2**32 - 1) // 20
"""Below this count each step draws 32 bits, from it on 64."""


def first_of_permutation(count: int, wanted: int, seed: int) -> NDArray[np.int64]:
    """Return the first `wanted` numbers of torch.randperm(count) with a generator that was seeded with `seed`."""
    steps = min(wanted, count - 1)
    words = steps if count < _SMALL else 2 * steps
    drawn = _words(words, seed)
    if count >= _SMALL:
        drawn = drawn[0::2] << np.uint64(32) | drawn[1::2]
    moved: dict[int, int] = {}
    found = np.empty(wanted, np.int64)
    for step, number in enumerate(drawn.tolist()):
        other = step + number % (count - step)
        found[step] = moved.get(other, other)
        moved[other] = moved.pop(step, step)
    if wanted == count:
        found[-1] = moved.get(count - 1, count - 1)
    return found


def kept_at_random(count: int, share: float, seed: int) -> NDArray[np.bool_]:
    """Return which of `count` values torch.bernoulli keeps with the probability `share` (f32) after manual_seed."""
    found: NDArray[np.bool_] = (_words(count, seed) & np.uint64(0xFFFFFF)) * np.float64(2**-24) < np.float32(share)
    return found


def uniform(shapes: Sequence[tuple[int, int]], bounds: Sequence[float], seed: int) -> list[F32]:
    """Return what Tensor.uniform_(-bound, bound) draws in f32 for one shape after the other, with one generator."""
    counts = [rows * columns for rows, columns in shapes]
    words = _words(sum(counts), seed)
    found, first = [], 0
    for shape, bound, count in zip(shapes, bounds, counts, strict=True):
        share = (words[first : first + count] & np.uint64(0xFFFFFF)).astype(np.float64) * 2**-24
        low, high = np.float32(-bound), np.float32(bound)
        # torch's build fuses this multiplication and addition of f32: one rounding
        drawn = share * np.float64(high - low) + np.float64(low)
        found.append(drawn.astype(np.float32).reshape(shape))
        first += count
    return found


def _words(count: int, seed: int) -> NDArray[np.uint64]:
    """Return the first numbers of 32 bits of the generator."""
    stream = np.random.RandomState(seed & 0xFFFFFFFF).bytes(4 * count)
    return np.frombuffer(stream, "<u4").astype(np.uint64)
