"""The standard error of a paired difference."""

from __future__ import annotations

import math

import numpy as np
import pytest
from lm_eval.api.metrics import mean, weighted_perplexity

from edgetune.evaluation.harness import paired_difference


def test_the_error_of_a_mean_is_that_of_the_differences() -> None:
    trained = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    file = [0.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    found = paired_difference(mean, trained, file)
    changes = np.subtract(file, trained)
    assert found.value == pytest.approx(-1 / 3)
    assert found.error == pytest.approx(changes.std(ddof=1) / math.sqrt(6))


def test_equal_answers_differ_by_nothing_without_an_error() -> None:
    found = paired_difference(mean, [0.0, 1.0, 1.0], [0.0, 1.0, 1.0])
    assert (found.value, found.error) == (0, 0)


def test_other_aggregations_are_resampled_by_document() -> None:
    generator = np.random.default_rng(1)
    words = generator.integers(5, 20, 400)
    trained = [(-float(count) * 2, int(count)) for count in words]
    file = [(score - float(generator.normal(0.1, 0.5)) * count, count) for score, count in trained]
    found = paired_difference(weighted_perplexity, trained, file)
    # perplexity is exp of the mean loss, so its error is the perplexity times that of the mean loss (delta method)
    losses = np.array([-score for score, _ in file]) / words.mean()
    ratio = math.exp(losses.mean())
    by_word = (np.array([-score for score, _ in file]) - np.log(ratio) * words) / words.mean()
    unchanged = np.array([-score for score, _ in trained]) - 2 * words
    assert abs(unchanged).max() == pytest.approx(0)
    assert found.value == pytest.approx(ratio - math.exp(2))
    assert found.error == pytest.approx(ratio * by_word.std(ddof=1) / math.sqrt(400), rel=0.1)


def test_one_document_has_no_error() -> None:
    assert math.isnan(paired_difference(mean, [1.0], [0.0]).error)
