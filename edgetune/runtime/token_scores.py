"""Log-probabilities of the tokens of a text, from blocks of logits that are never kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgetune.runtime.slots import log_probabilities


@dataclass(frozen=True)
class ScoredTokens:
    """The log-probabilities of m tokens of a text, natural logarithms.

    Attributes:
        logprobs: That of each token, f64 [m].
        top_ids: The most likely tokens at each place, the most likely first, i32 [m, top].
        top_logprobs: Their log-probabilities, f64 [m, top].
        is_top: Whether each token is the most likely one at its place, bool [m].
    """

    logprobs: NDArray[np.float64]
    top_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float64]
    is_top: NDArray[np.bool_]


class ScoreCollector:
    """Scores tokens [m] as the blocks of their logits come, in order."""

    def __init__(self, tokens: NDArray[np.int32], top: int) -> None:
        self._tokens, self._top = tokens, top
        self._scores = ScoredTokens(
            np.empty(len(tokens)), np.empty((len(tokens), top), np.int32), np.empty((len(tokens), top)),
            np.empty(len(tokens), np.bool_),
        )  # fmt: skip
        self._count = 0

    def add(self, block: NDArray[np.float32]) -> None:
        """Score the next tokens by their logits [k, V]."""
        for logits in block:
            place, token = self._count, int(self._tokens[self._count])
            self._scores.logprobs[place], top = log_probabilities(logits, token, self._top)
            self._scores.is_top[place] = token == logits.argmax()
            for rank, (id_, logprob) in enumerate(top):
                self._scores.top_ids[place, rank], self._scores.top_logprobs[place, rank] = id_, logprob
            self._count += 1

    def result(self) -> ScoredTokens:
        """Return the scores of all tokens."""
        return self._scores
