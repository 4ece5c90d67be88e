"""What stands in llama.cpp's cache before every text."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgetune.runtime.llama.context import BATCH, LlamaContext


class EvaluatedPrefix:
    """Soft tokens of the vocabulary, evaluated before each text."""

    def __init__(self, ids: NDArray[np.int32]) -> None:
        self._ids = ids
        self.length = len(ids)

    def put(self, context: LlamaContext, sequence: int) -> None:
        """Evaluate the tokens at the positions 0 to `length` - 1."""
        for start in range(0, self.length, BATCH):
            piece = self._ids[start : start + BATCH]
            context.decode_at(piece, start, np.zeros(len(piece), np.int8), sequence)
