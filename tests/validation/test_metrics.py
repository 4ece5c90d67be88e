"""Figures against a plain oracle in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgetune.reference.codecs import F32
from edgetune.reference.scored_rows import ScoredRows
from edgetune.reference.store import Reference
from edgetune.reference.writer import ReferenceWriter
from edgetune.validation import metrics
from edgetune.validation.metrics import TokenScores, mean_of

VOCAB, COUNT = 97, 240
RANDOM = np.random.default_rng(5)
TRAINED: F32 = RANDOM.normal(0, 3, (COUNT, VOCAB)).astype(np.float32)
OTHER: F32 = TRAINED + RANDOM.normal(0, 0.7, TRAINED.shape).astype(np.float32)
BASE: F32 = RANDOM.normal(0, 3, TRAINED.shape).astype(np.float32)


def probabilities(logits: F32) -> np.ndarray:
    wide = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(wide / wide.sum(axis=1, keepdims=True))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Targets are drawn from the trained model, so that it is better than the base."""
    likely = np.array([RANDOM.choice(VOCAB, p=row) for row in probabilities(TRAINED)])
    tokens = np.concatenate([[0], likely]).astype(np.int32)
    rows = ScoredRows(tokens, np.array([0, COUNT + 1]), np.arange(1, COUNT + 1))
    directory = tmp_path_factory.mktemp("metrics") / "reference"
    with ReferenceWriter(directory, rows, vocab_size=VOCAB, full_vocabulary_limit=10**6, top_k=1, info={}) as writer:
        writer.add_trained(TRAINED)
        writer.add_base(BASE)
    return Reference.open(directory)


def scored(reference: Reference, logits: F32) -> TokenScores:
    found = reference.compare(0, logits)
    return TokenScores(found.kld, found.top, found.nll)


def test_every_figure_is_that_of_the_full_distributions(reference: Reference) -> None:
    found = metrics.figures(scored(reference, OTHER), reference)
    p, q, base = probabilities(TRAINED), probabilities(OTHER), probabilities(BASE)
    at = (np.arange(COUNT), reference.rows.targets)
    kld = (p * np.log(p / q)).sum(axis=1)
    nll, trained, before = -np.log(q[at]), -np.log(p[at]), -np.log(base[at])
    assert found.tokens == COUNT
    assert found.cross_entropy.value == pytest.approx(nll.mean())
    assert found.perplexity.value == pytest.approx(math.exp(nll.mean()))
    assert found.kld.value == pytest.approx(kld.mean(), rel=1e-3)
    assert found.kld.error == pytest.approx(kld.std(ddof=1) / math.sqrt(COUNT), rel=1e-3)
    assert found.kld_percentiles["99"] == pytest.approx(np.percentile(kld, 99), rel=1e-3)
    assert found.kld_max == pytest.approx(kld.max(), rel=1e-3)
    assert found.same_top.value == np.mean(p.argmax(1) == q.argmax(1))
    assert found.delta_p.value == pytest.approx((q - p)[at].mean())
    assert found.delta_p_rms == pytest.approx(math.sqrt(((q - p)[at] ** 2).mean()))
    assert found.recovery == pytest.approx((before.mean() - nll.mean()) / (before.mean() - trained.mean()))
    # covariance-aware: the variance of ln PPL(Q)/PPL(base) is var(a) + var(b) - 2 cov(a, b), as llama-perplexity has it
    covariance = np.cov(nll, trained)
    error = math.sqrt((covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]) / COUNT)
    ratio = math.exp(nll.mean() - trained.mean())
    assert found.perplexity_ratio.value == pytest.approx(ratio)
    assert found.perplexity_ratio.error == pytest.approx(ratio * error)


def test_a_model_against_itself_is_at_the_floor(reference: Reference) -> None:
    floor = metrics.figures(metrics.of_trained(reference, COUNT), reference)
    itself = metrics.figures(scored(reference, TRAINED), reference)
    assert itself.recovery == pytest.approx(1)
    assert itself.kld.value == pytest.approx(floor.kld.value, rel=1e-5)
    assert itself.kld.value < 1e-6
    assert itself.same_top.value == 1
    assert itself.perplexity_ratio.value == pytest.approx(1)
    assert itself.perplexity_ratio.error == pytest.approx(0, abs=1e-9)
    assert itself.delta_p_rms == pytest.approx(0, abs=1e-7)


def test_the_base_recovers_nothing(reference: Reference) -> None:
    found = metrics.figures(metrics.of_base(reference, COUNT), reference)
    assert found.recovery == pytest.approx(0)
    assert found.kld.value > 1


def test_a_part_of_the_rows(reference: Reference) -> None:
    part = scored(reference, OTHER)
    found = metrics.figures(TokenScores(part.kld[:50], part.top[:50], part.nll[:50]), reference)
    assert found.tokens == 50
    assert found.kld.value == pytest.approx(part.kld[:50].mean())


def test_recovery_is_not_defined_without_a_gain() -> None:
    assert metrics._recovery(2.0, trained=3.0, base=3.0) is None
    assert metrics._recovery(2.0, trained=3.5, base=3.0) is None


def test_a_single_token_has_no_error() -> None:
    assert math.isnan(mean_of(np.array([1.0])).error)
