"""The figures of one model of the ladder, by the formulas of llama-perplexity (docs/validate.md, "Figures").

Everything is computed in float64 from one entry per scored token. Standard errors assume independent tokens, as
llama-perplexity does; the tokens of one row are correlated, so the true errors are somewhat larger.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgetune.reference.codecs import F64, I64
from edgetune.reference.store import Reference
from edgetune.validation.results import Figures, Mean

KLD_PERCENTILES = (0.1, 1.0, 5.0, 10.0, 50.0, 90.0, 95.0, 99.0, 99.9)
DELTA_PERCENTILES = (0.1, 1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9)
_NO_GAIN = 1e-9  # nats; a smaller gain is no gain


@dataclass(frozen=True)
class TokenScores:
    """The scores of one model at P tokens."""

    kld: F64
    """[P] KL(trained || model) in nats; NaN where it was not measured."""
    top: I64
    """[P] most likely token."""
    nll: F64
    """[P] nats."""

    def first(self, count: int) -> TokenScores:
        """The first `count` tokens."""
        return TokenScores(self.kld[:count], self.top[:count], self.nll[:count])


@dataclass(frozen=True)
class TokenPairs:
    """The scores of two models at the same P tokens."""

    kld: F64
    """[P] nats."""
    same_top: NDArray[np.bool_]
    """[P]"""
    nll: F64
    """[P] nats."""
    nll_reference: F64
    """[P] nats."""


def mean_of(values: F64) -> Mean:
    """Return the mean of `values` [n] with its standard error, which is NaN for a single value."""
    count = len(values)
    error = float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return Mean(value=float(values.mean()), error=error)


def figures(scored: TokenScores, reference: Reference) -> Figures:
    """Compare a model with the trained model at the reference's first `len(scored.nll)` tokens."""
    part = slice(len(scored.nll))
    trained, base = reference.trained_nll[part], reference.base_nll[part]
    pairs = TokenPairs(scored.kld, scored.top == reference.trained_top[part], scored.nll, trained)
    return figures_of_pairs(pairs, _recovery(float(scored.nll.mean()), float(trained.mean()), float(base.mean())))


def figures_of_pairs(pairs: TokenPairs, recovery: float | None = None) -> Figures:
    """Return every figure that llama-perplexity prints; `recovery` needs a third model and is given."""
    change = np.exp(-pairs.nll) - np.exp(-pairs.nll_reference)
    entropy, reference = mean_of(pairs.nll), mean_of(pairs.nll_reference)
    ratio, square = mean_of(pairs.nll - pairs.nll_reference), mean_of(change**2)
    perplexity, perplexity_trained = _exponential(entropy), _exponential(reference)
    covariance = (entropy.error**2 + reference.error**2 - ratio.error**2) / 2
    rms = math.sqrt(square.value)
    return Figures(
        tokens=len(pairs.nll),
        cross_entropy=entropy,
        perplexity=perplexity,
        perplexity_trained=perplexity_trained,
        perplexity_ratio=_exponential(ratio),
        log_perplexity_ratio=ratio,
        perplexity_difference=_difference(perplexity, perplexity_trained, covariance),
        correlation=_ratio(covariance, entropy.error * reference.error),
        kld=mean_of(pairs.kld),
        kld_percentiles=_percentiles(pairs.kld, KLD_PERCENTILES),
        kld_min=float(pairs.kld.min()),
        kld_max=float(pairs.kld.max()),
        same_top=mean_of(pairs.same_top.astype(np.float64)),
        delta_p=mean_of(change),
        delta_p_rms=rms,
        delta_p_rms_error=_ratio(0.5 * square.error, rms),
        delta_p_min=float(change.min()),
        delta_p_max=float(change.max()),
        delta_p_percentiles=_percentiles(change, DELTA_PERCENTILES),
        recovery=recovery,
    )


def _difference(one: Mean, other: Mean, covariance: float) -> Mean:
    """Return the difference of two perplexities; `covariance` is that of their logarithms."""
    variance = one.error**2 + other.error**2 - 2 * one.value * other.value * covariance
    return Mean(value=one.value - other.value, error=math.sqrt(max(variance, 0.0)))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def of_trained(reference: Reference, count: int) -> TokenScores:
    """Return the trained model's scores against its own stored outputs: the floor that the codec sets."""
    return TokenScores(
        reference.trained_floor[:count].astype(np.float64),
        reference.trained_top[:count].astype(np.int64),
        reference.trained_nll[:count],
    )


def of_base(reference: Reference, count: int) -> TokenScores:
    """Return the scores of the base model."""
    return TokenScores(
        reference.base_kld[:count], reference.base_top[:count].astype(np.int64), reference.base_nll[:count]
    )


def _exponential(log: Mean) -> Mean:
    """Return exp of a mean, its error to first order; infinite where it overflows."""
    value = math.exp(log.value) if log.value < 700 else math.inf
    return Mean(value=value, error=value * log.error)


def _percentiles(values: F64, percents: tuple[float, ...]) -> dict[str, float]:
    return {
        f"{percent:g}": float(value) for percent, value in zip(percents, np.percentile(values, percents), strict=True)
    }


def _recovery(artifact: float, trained: float, base: float) -> float | None:
    gain = base - trained
    return (base - artifact) / gain if gain > _NO_GAIN else None
