"""Multiple choice: the answer is the choice with the largest log-likelihood after the prompt. Nothing is generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Encode = Callable[[str], Sequence[int]]
Continuation = tuple[NDArray[np.int32], NDArray[np.int64]]
"""Token ids of prompt and choice, and the positions of the choice within them."""


def continuations(encode: Encode, prompt: str, choices: Sequence[str]) -> list[Continuation]:
    """Tokenize each choice with the prompt, as one text; the tokens that differ from the prompt's are the choice."""
    alone = np.asarray(encode(prompt), np.int32)
    found = []
    for choice in choices:
        ids = np.asarray(encode(prompt + choice), np.int32)
        shared = min(len(alone), len(ids))
        differing = np.flatnonzero(alone[:shared] != ids[:shared])
        start = max(1, int(differing[0]) if len(differing) else shared)
        found.append((ids, np.arange(start, len(ids))))
    return found


def log_likelihoods(logits: NDArray[np.float32], targets: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return the log-probabilities [m] of the targets [m] under logits [m, V]."""
    high = logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(logits - high).sum(axis=1, dtype=np.float64)) + high[:, 0]
    return np.asarray(logits[np.arange(len(logits)), targets] - total, np.float64)


def best(choices: Sequence[str], scores: Sequence[float]) -> str:
    """Return the choice with the largest score, the first one of equals."""
    return choices[int(np.argmax(scores))]
