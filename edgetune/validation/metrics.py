"""Figures of one rung of the ladder, in the words and with the formulas of DESIGN section 4.

Everything is computed in float64 from one entry a scored token. Standard errors take the tokens as independent, as
llama-perplexity does; tokens of one row are not quite, so the true errors are somewhat larger.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgetune.reference.codecs import F64, I64
from edgetune.reference.store import Reference

KLD_PERCENTILES = (0.1, 1.0, 5.0, 10.0, 50.0, 90.0, 95.0, 99.0, 99.9)
DELTA_PERCENTILES = (0.1, 1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9)
_NO_GAIN = 1e-9  # nats; below it training has changed nothing that could be recovered


@dataclass(frozen=True)
class TokenScores:
    """What a model says at P scored tokens."""

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
class Mean:
    """A mean and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: F64) -> Mean:
        """NaN as the error of a single value."""
        count = len(values)
        error = float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else math.nan
        return cls(float(values.mean()), error)


@dataclass(frozen=True)
class Figures:
    """One model against the reference, which is the trained model (or the base of a llama.cpp file)."""

    tokens: int
    cross_entropy: Mean
    """Nats per token."""
    perplexity: Mean
    perplexity_trained: Mean
    """The reference's own, on the same tokens."""
    perplexity_ratio: Mean
    """Over the reference's; its error knows that both were measured on the same tokens."""
    log_perplexity_ratio: Mean
    perplexity_difference: Mean
    """The reference's taken away; its error knows their covariance, too."""
    correlation: float
    """Of the two models' log-probabilities of the tokens that are there; NaN for a constant one."""
    kld: Mean
    """Nats per token; NaN where not measured."""
    kld_percentiles: dict[str, float]
    kld_min: float
    kld_max: float
    same_top: Mean
    """Share of tokens with the same most likely token."""
    delta_p: Mean
    """Mean change of the probability of the token that is there."""
    delta_p_rms: float
    delta_p_rms_error: float
    delta_p_min: float
    delta_p_max: float
    delta_p_percentiles: dict[str, float]
    recovery: float | None
    """Share of the trained gain over the base that arrived; None where training gained nothing on these rows."""


@dataclass(frozen=True)
class TokenPairs:
    """What two models say at the same P scored tokens."""

    kld: F64
    """[P] nats."""
    same_top: NDArray[np.bool_]
    """[P]"""
    nll: F64
    """[P] nats."""
    nll_reference: F64
    """[P] nats."""


def figures(scored: TokenScores, reference: Reference) -> Figures:
    """Compare what a model says at the reference's first `len(scored.nll)` tokens with the trained model."""
    part = slice(len(scored.nll))
    trained, base = reference.trained_nll[part], reference.base_nll[part]
    pairs = TokenPairs(scored.kld, scored.top == reference.trained_top[part], scored.nll, trained)
    return figures_of_pairs(pairs, _recovery(float(scored.nll.mean()), float(trained.mean()), float(base.mean())))


def figures_of_pairs(pairs: TokenPairs, recovery: float | None = None) -> Figures:
    """Every figure that llama-perplexity prints, and `recovery`, which needs a third model."""
    change = np.exp(-pairs.nll) - np.exp(-pairs.nll_reference)
    entropy, reference = Mean.of(pairs.nll), Mean.of(pairs.nll_reference)
    ratio, square = Mean.of(pairs.nll - pairs.nll_reference), Mean.of(change**2)
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
        correlation=_divided(covariance, entropy.error * reference.error),
        kld=Mean.of(pairs.kld),
        kld_percentiles=_percentiles(pairs.kld, KLD_PERCENTILES),
        kld_min=float(pairs.kld.min()),
        kld_max=float(pairs.kld.max()),
        same_top=Mean.of(pairs.same_top.astype(np.float64)),
        delta_p=Mean.of(change),
        delta_p_rms=rms,
        delta_p_rms_error=_divided(0.5 * square.error, rms),
        delta_p_min=float(change.min()),
        delta_p_max=float(change.max()),
        delta_p_percentiles=_percentiles(change, DELTA_PERCENTILES),
        recovery=recovery,
    )


def _difference(one: Mean, other: Mean, covariance: float) -> Mean:
    """Of two perplexities; `covariance` is that of their logarithms."""
    variance = one.error**2 + other.error**2 - 2 * one.value * other.value * covariance
    return Mean(one.value - other.value, math.sqrt(max(variance, 0.0)))


def _divided(number: float, by: float) -> float:
    return number / by if by else math.nan


def of_trained(reference: Reference, count: int) -> TokenScores:
    """The trained model against what is stored of it: the floor that the coding sets."""
    return TokenScores(
        reference.trained_floor[:count].astype(np.float64),
        reference.trained_top[:count].astype(np.int64),
        reference.trained_nll[:count],
    )


def of_base(reference: Reference, count: int) -> TokenScores:
    """The base model before training."""
    return TokenScores(
        reference.base_kld[:count], reference.base_top[:count].astype(np.int64), reference.base_nll[:count]
    )


def _exponential(log: Mean) -> Mean:
    """exp of a mean; its error by first order. Infinite where it does not fit a float."""
    value = math.exp(log.value) if log.value < 700 else math.inf
    return Mean(value, value * log.error)


def _percentiles(values: F64, wanted: tuple[float, ...]) -> dict[str, float]:
    return {f"{percent:g}": float(value) for percent, value in zip(wanted, np.percentile(values, wanted), strict=True)}


def _recovery(artifact: float, trained: float, base: float) -> float | None:
    gain = base - trained
    return (base - artifact) / gain if gain > _NO_GAIN else None
