"""Rows of token ids and which of their tokens are scored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgetune.reference.codecs import I64


@dataclass(frozen=True)
class ScoredRows:
    """Held-out rows in one array, and the positions of their scored tokens."""

    tokens: NDArray[np.int32]
    """[T] token ids of all rows."""
    row_offsets: I64
    """[n + 1] where each row starts in `tokens`; the last entry is T."""
    positions: I64
    """[P] increasing indices into `tokens`; tokens[p] is predicted from the tokens of its row before p."""

    def __post_init__(self) -> None:
        """Raise ValueError for inconsistent offsets or positions."""
        object.__setattr__(self, "tokens", np.ascontiguousarray(self.tokens, np.int32))
        object.__setattr__(self, "row_offsets", np.ascontiguousarray(self.row_offsets, np.int64))
        object.__setattr__(self, "positions", np.ascontiguousarray(self.positions, np.int64))
        offsets, positions = self.row_offsets, self.positions
        if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(self.tokens) or np.any(np.diff(offsets) < 1):
            raise ValueError("row_offsets must rise from 0 to the number of tokens")
        if len(positions) and (positions[0] < 0 or positions[-1] >= len(self.tokens) or np.any(np.diff(positions) < 1)):
            raise ValueError("positions must increase and lie within the tokens")
        if np.isin(positions, offsets).any():
            raise ValueError("the first token of a row is predicted from nothing and cannot be scored")

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.row_offsets) - 1

    @property
    def targets(self) -> I64:
        """[P] the tokens at the scored positions."""
        return self.tokens[self.positions].astype(np.int64)

    def __iter__(self) -> Iterator[tuple[NDArray[np.int32], I64, slice]]:
        """Yield the ids of each row, the scored positions within it, and their slice of all P positions."""
        bounds = np.searchsorted(self.positions, self.row_offsets)
        for row in range(len(self)):
            start, stop = self.row_offsets[row], self.row_offsets[row + 1]
            scored = slice(int(bounds[row]), int(bounds[row + 1]))
            yield self.tokens[start:stop], self.positions[scored] - start, scored

    def first(self, count: int) -> ScoredRows:
        """Return the first `count` rows."""
        end = self.row_offsets[min(count, len(self))]
        positions = self.positions[: np.searchsorted(self.positions, end)]
        return ScoredRows(self.tokens[:end], self.row_offsets[: min(count, len(self)) + 1], positions)
