"""Several sequences in one context of llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from edgetune.runtime.batching import SequenceBatch
from edgetune.runtime.llama.context import BATCH, LlamaContext

F32 = NDArray[np.float32]


def prefill(context: LlamaContext, prompt: NDArray[np.int32], sequence: int = 0) -> F32:
    """Clear the cache of a sequence, evaluate a prompt and return the logits [V] after its last token, a view."""
    context.begin(sequence)
    outputs = np.zeros(len(prompt), np.int8)
    outputs[-1] = 1
    for start in range(0, len(prompt), BATCH):
        stop = min(start + BATCH, len(prompt))
        context.decode(prompt[start:stop], start, outputs[start:stop], sequence)
    logits: F32 = context.logits(1)[0]
    return logits


class LlamaSequences(SequenceBatch):
    """Sequences of a context that was made for `capacity` of them and is closed with them."""

    def __init__(self, context: LlamaContext, capacity: int) -> None:
        self.capacity = capacity
        self._context = context
        self._free = list(reversed(range(capacity)))
        self._sequences: list[int] = []
        self._lengths: list[int] = []

    @override
    def admit(self, prompt: NDArray[np.int32]) -> F32:
        self._sequences.append(self._free.pop())
        self._lengths.append(len(prompt))
        return prefill(self._context, prompt, self._sequences[-1])

    @override
    def step(self, tokens: Sequence[int]) -> F32:
        logits = self._context.step_together(tokens, self._lengths, self._sequences)
        self._lengths = [length + 1 for length in self._lengths]
        return logits

    @override
    def retire(self, number: int) -> None:
        sequence = self._sequences[number]
        self._context.clear(sequence)
        self._free.append(sequence)
        for kept in (self._sequences, self._lengths):
            kept[number] = kept[-1]
            kept.pop()

    @override
    def close(self) -> None:
        self._context.close()
