"""Keys and values of sequences that have ended, for prompts that begin alike."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Past = list[NDArray[Any]]
"""Keys and values of one sequence: [heads, length, head_size] for each cache tensor."""

LEAST_COMMON = 16
"""Tokens in common from which a cache is continued: fewer are evaluated faster than their cache is copied."""


def count_common(one: NDArray[np.int32], other: Sequence[int] | NDArray[np.int32]) -> int:
    """Return how many ids two texts begin with in common."""
    most = min(len(one), len(other))
    differ = np.flatnonzero(one[:most] != np.asarray(other[:most], np.int32))
    return int(differ[0]) if len(differ) else most


class PrefixCache:
    """The most recent sequences, as many as fit into a number of bytes."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes, self._bytes = most_bytes, 0
        self._kept: OrderedDict[bytes, tuple[NDArray[np.int32], Past]] = OrderedDict()

    def keep(self, ids: NDArray[np.int32], past: Past) -> None:
        """Keep a sequence: its ids without the prefix of the model, and copies of its keys and values with it."""
        size = sum(values.nbytes for values in past)
        if len(ids) < LEAST_COMMON or size > self._most_bytes:
            return
        for key, (other, _) in list(self._kept.items()):
            if count_common(other, ids) == len(other):
                self._drop(key)
        self._kept[ids.tobytes()] = ids, past
        self._bytes += size
        while self._bytes > self._most_bytes:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: bytes) -> None:
        _, past = self._kept.pop(key)
        self._bytes -= sum(values.nbytes for values in past)

    def match(self, ids: NDArray[np.int32]) -> int:
        """Return how many ids a kept sequence has in common with a text."""
        return max((count_common(ids, other) for other, _ in self._kept.values()), default=0)

    def find(self, ids: NDArray[np.int32]) -> Past:
        """Return the keys and values of the sequence that has most in common with a text. There must be one."""
        key = max(self._kept, key=lambda each: count_common(ids, self._kept[each][0]))
        self._kept.move_to_end(key)
        return self._kept[key][1]
