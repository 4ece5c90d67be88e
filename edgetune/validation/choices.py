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
    encode: Encode,
    decode: Decode,
    prompt: str,
    choices: Sequence[str],
    markers: Sequence[str] = (),
    *,
    prefix: str = "",
) -> list[Continuation]:
    """Tokenize each choice behind the prompt, whose own tokens stay as they are, as in a training row.

    Args:
        encode: Token ids of a text.
        decode: The text of token ids.
        prompt: The conversation up to where the answer begins.
        choices: The choices.
        markers: Special tokens, as text.
        prefix: What the template writes between prompt and choice. Its tokens are not scored, except for those that
            are one with the beginning of a choice: then all choices are scored from there on.
    """
    given = list(encode(prompt))
    before = continue_ids(encode, decode, prompt, given, prefix, markers) if prefix else []
    found = [[*given, *continue_ids(encode, decode, prompt, given, prefix + each, markers)] for each in choices]
    alone = [*given, *before]
    start = max(1, min((_count_equal(alone, ids) for ids in found), default=1))
    return [(np.asarray(ids, np.int32), np.arange(start, len(ids))) for ids in found]


def _count_equal(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens that both begin with."""
    shared = min(len(one), len(other))
    return next((i for i in range(shared) if one[i] != other[i]), shared)


def tokenize_choices(
    tokenizer: TextTokenizer, prompt: str, choices: Sequence[str], prefix: str = ""
) -> list[Continuation]:
    """Tokenize each choice behind prompt and prefix with the tokenizer of a training."""
    return continuations(
        lambda text: tokenizer.encode(text)[0], tokenizer.decode, prompt, choices, tokenizer.stop_texts, prefix=prefix
    )


def log_likelihoods(logits: NDArray[np.float32], targets: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return the log-probabilities [m] of the targets [m] under logits [m, V]."""
    high = logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(logits - high).sum(axis=1, dtype=np.float64)) + high[:, 0]
    return np.asarray(logits[np.arange(len(logits)), targets] - total, np.float64)


def best(choices: Sequence[str], scores: Sequence[float]) -> str:
    """Return the choice with the largest score, the first one of equals."""
    return choices[int(np.argmax(scores))]
