"""Several texts in one context of llama.cpp, each a sequence of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgetune.runtime.llama.context import BATCH, LlamaContext

F32 = NDArray[np.float32]


def prefill(context: LlamaContext, prompt: NDArray[np.int32], sequence: int = 0) -> F32:
    """The logits [V] after the last token of a prompt, a view."""
    wanted = np.zeros(len(prompt), np.int8)
    wanted[-1] = 1
    for start in range(0, len(prompt), BATCH):
        stop = min(start + BATCH, len(prompt))
        context.decode(prompt[start:stop], start, wanted[start:stop], sequence)
    logits: F32 = context.logits(1)[0]
    return logits


class LlamaSequences:
    """See Rows. `context` has `size` sequences, and is closed with the rows."""

    def __init__(self, context: LlamaContext, size: int) -> None:
        self.size = size
        self._context = context
        self._free = list(reversed(range(size)))
        self._sequences: list[int] = []
        self._lengths: list[int] = []

    def admit(self, prompt: NDArray[np.int32]) -> F32:
        """See Rows."""
        self._sequences.append(self._free.pop())
        self._lengths.append(len(prompt))
        return prefill(self._context, prompt, self._sequences[-1])

    def step(self, tokens: Sequence[int]) -> F32:
        """See Rows."""
        logits = self._context.step_together(tokens, self._lengths, self._sequences)
        self._lengths = [length + 1 for length in self._lengths]
        return logits

    def drop(self, row: int) -> None:
        """See Rows."""
        sequence = self._sequences[row]
        self._context.forget(sequence)
        self._free.append(sequence)
        for kept in (self._sequences, self._lengths):
            kept[row] = kept[-1]
            kept.pop()

    def close(self) -> None:
        """See Rows."""
        self._context.close()
