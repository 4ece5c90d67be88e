"""The probability that the added rows of a soft prompt take, which the logits of a runtime leave out.

A file with a soft prompt has rows of the output matrix that training had not. A runtime returns the logits of the
others, so that probabilities are those of training; another program divides by the sum over all rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_PIECE = 64  # rows of logits at a time


@dataclass
class HiddenMass:
    """The share of the probability on hidden rows, over positions."""

    positions: int = 0
    total: float = 0.0
    largest: float = 0.0
    lost: float = 0.0
    """Sum of -log(1 - share): what the log-probability of every token loses."""

    def add(self, logits: NDArray[np.float32], visible: int) -> None:
        """Add the positions of logits [m, V + hidden], of which the first `visible` are of training."""
        for start in range(0, len(logits), _PIECE):
            part = logits[start : start + _PIECE].astype(np.float64)
            weights = np.exp(part - part.max(axis=1, keepdims=True))
            hidden = weights[:, visible:].sum(axis=1)
            share = hidden / weights.sum(axis=1)
            self.positions += len(share)
            self.total += float(share.sum())
            self.largest = max(self.largest, float(share.max()))
            self.lost -= float(np.log1p(-np.minimum(share, 1 - 2**-53)).sum())

    @property
    def mean(self) -> float:
        """The mean share; NaN without a position."""
        return self.total / self.positions if self.positions else math.nan

    @property
    def divergence(self) -> float:
        """How much larger the mean KL divergence from the trained model is with the hidden rows, in nats."""
        return self.lost / self.positions if self.positions else math.nan
