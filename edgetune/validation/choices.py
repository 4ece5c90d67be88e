"""Multiple choice: the answer is the choice with the largest log-likelihood after the prompt. Nothing is generated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgetune.data.continuation import Decode, Encode, continue_ids
from edgetune.data.text_tokenizer import TextTokenizer

Continuation = tuple[NDArray[np.int32], NDArray[np.int64]]
"""Token ids of prompt and choice, and the positions of the choice within them."""


def continuations(
    encode: Encode, decode: Decode, prompt: str, choices: Sequence[str], markers: Sequence[str] = ()
) -> list[Continuation]:
    """Tokenize each choice behind the prompt, whose own tokens stay as they are, as in a training row."""
    given = list(encode(prompt))
    found = []
    for choice in choices:
        ids = np.asarray([*given, *continue_ids(encode, decode, prompt, given, choice, markers)], np.int32)
        found.append((ids, np.arange(max(1, len(given)), len(ids))))
    return found


def tokenize_choices(tokenizer: TextTokenizer, prompt: str, choices: Sequence[str]) -> list[Continuation]:
    """Tokenize each choice behind the prompt with the tokenizer of a training."""
    return continuations(
        lambda text: tokenizer.encode(text)[0], tokenizer.decode, prompt, choices, tokenizer.stop_texts
    )


def log_likelihoods(logits: NDArray[np.float32], targets: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return the log-probabilities [m] of the targets [m] under logits [m, V]."""
    high = logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(logits - high).sum(axis=1, dtype=np.float64)) + high[:, 0]
    return np.asarray(logits[np.arange(len(logits)), targets] - total, np.float64)


def best(choices: Sequence[str], scores: Sequence[float]) -> str:
    """Return the choice with the largest score, the first one of equals."""
    return choices[int(np.argmax(scores))]
