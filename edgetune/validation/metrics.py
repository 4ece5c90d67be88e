"""Figures of one rung of the ladder, in the words and with the formulas of DESIGN section 4.

Everything is computed in float64 from one entry a scored token. Standard errors take the tokens as independent, as
llama-perplexity does; tokens of one row are not quite, so the true errors are somewhat larger.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgetune.codings import F64, I64
from edgetune.reference import Reference

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
_NO_GAIN = 1e-9  # nats; below it training has changed nothing that could be recovered


@dataclass(frozen=True)
class Scored:
    """What a model says at P scored tokens."""

    kld: F64
    """[P] KL(trained || model) in nats; NaN where it was not measured."""
    top: I64
    """[P] most likely token."""
    nll: F64
    """[P] nats."""


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
    """One rung against the trained model."""

    tokens: int
    cross_entropy: Mean
    """Nats per token."""
    perplexity: Mean
    perplexity_ratio: Mean
    """Over the trained model's; its error knows that both were measured on the same tokens."""
    kld: Mean
    """Nats per token; NaN where not measured."""
    kld_percentiles: dict[str, float]
    kld_max: float
    same_top: Mean
    """Share of tokens with the same most likely token."""
    delta_p: Mean
    """Mean change of the probability of the token that is there."""
    delta_p_rms: float
    delta_p_percentiles: dict[str, float]
    recovery: float | None
    """Share of the trained gain over the base that arrived; None where training gained nothing on these rows."""


def figures(scored: Scored, reference: Reference) -> Figures:
    """Compare what a model says at the reference's first `len(scored.nll)` tokens with the trained model."""
    count = len(scored.nll)
    trained, base = reference.trained_nll[:count], reference.base_nll[:count]
    change = np.exp(-scored.nll) - np.exp(-trained)
    entropy = Mean.of(scored.nll)
    return Figures(
        tokens=count,
        cross_entropy=entropy,
        perplexity=_exponential(entropy),
        perplexity_ratio=_exponential(Mean.of(scored.nll - trained)),
        kld=Mean.of(scored.kld),
        kld_percentiles=_percentiles(scored.kld, PERCENTILES),
        kld_max=float(scored.kld.max()),
        same_top=Mean.of((scored.top == reference.trained_top[:count]).astype(np.float64)),
        delta_p=Mean.of(change),
        delta_p_rms=float(np.sqrt(np.mean(change**2))),
        delta_p_percentiles=_percentiles(change, (1.0, 5.0, *PERCENTILES)),
        recovery=_recovery(entropy.value, float(trained.mean()), float(base.mean())),
    )


def of_trained(reference: Reference, count: int) -> Scored:
    """The trained model against what is stored of it: the floor that the coding sets."""
    return Scored(
        reference.trained_floor[:count].astype(np.float64),
        reference.trained_top[:count].astype(np.int64),
        reference.trained_nll[:count],
    )


def of_base(reference: Reference, count: int) -> Scored:
    """The base model before training."""
    return Scored(reference.base_kld[:count], reference.base_top[:count].astype(np.int64), reference.base_nll[:count])


def _exponential(log: Mean) -> Mean:
    """exp of a mean; its error by first order. Infinite where it does not fit a float."""
    value = math.exp(log.value) if log.value < 700 else math.inf
    return Mean(value, value * log.error)


def _percentiles(values: F64, wanted: tuple[float, ...]) -> dict[str, float]:
    return {f"{percent:g}": float(value) for percent, value in zip(wanted, np.percentile(values, wanted), strict=True)}


def _recovery(artifact: float, trained: float, base: float) -> float | None:
    gain = base - trained
    return (base - artifact) / gain if gain > _NO_GAIN else None
