"""The scores of a reward model's file beside those of the trained model, on both answers of held-out pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgetune.console import Progress
from edgetune.errors import RuntimeProblem
from edgetune.reference.reward_scores import RewardScores
from edgetune.runtime import Runtime
from edgetune.validation.numbers import share, short
from edgetune.validation.results import ScoreFigures

_ROWS_AT_A_TIME = 16
NO_HEAD = "the file has no score head, and the run trained a reward model: export the run again"


def measure_scores(runtime: Runtime, stored: RewardScores, progress: Progress) -> ScoreFigures:
    """Score both answers of every pair with a file, and compare the scores with those of the trained model.

    Raises:
        RuntimeProblem: A score is not a finite number.
    """
    rows, found = stored.rows, list[float]()
    for start in range(0, len(rows), _ROWS_AT_A_TIME):
        found += runtime.reward_scores(rows[start : start + _ROWS_AT_A_TIME]).tolist()
        progress(len(found), len(rows))
    if not np.isfinite(found).all():
        number = int(np.flatnonzero(~np.isfinite(found))[0])
        raise RuntimeProblem(
            f"the score that {runtime.path} gives to pair {number % len(stored.pairs) + 1} is not a finite number",
            "Its weights are damaged or out of range: export again, with another storage type if the error remains",
        )
    return compare_scores(found, stored.scores)


def compare_scores(found: Sequence[float], trained: Sequence[float]) -> ScoreFigures:
    """Compare scores: those of the chosen answers of all pairs, then those of the rejected ones."""
    ours, theirs = np.array(found, np.float64), np.array(trained, np.float64)
    pairs = len(ours) // 2
    ranked, expected = _is_chosen_higher(ours), _is_chosen_higher(theirs)
    difference = np.abs(ours - theirs)
    return ScoreFigures(
        pairs=pairs,
        mean_difference=float(difference.mean()) if pairs else math.nan,
        max_difference=float(difference.max()) if pairs else math.nan,
        correlation=_correlation(ours, theirs),
        accuracy=float(ranked.mean()) if pairs else math.nan,
        trained_accuracy=float(expected.mean()) if pairs else math.nan,
        flips=float((ranked != expected).mean()) if pairs else math.nan,
        trained_spread=float(theirs.std()) if pairs else math.nan,
    )


def _is_chosen_higher(scores: NDArray[np.float64]) -> NDArray[np.bool_]:
    pairs = len(scores) // 2
    return np.asarray(scores[:pairs] > scores[pairs:])


def _correlation(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    """Return Pearson's correlation; NaN where one of both is constant."""
    if len(ours) < 2 or not ours.std() or not theirs.std():
        return math.nan
    return float(np.corrcoef(ours, theirs)[0, 1])


def describe_scores(figures: ScoreFigures) -> str:
    """Return the figures as a line for the terminal."""

    def plain(value: float) -> str:
        return short(value, plain=True)

    return (
        f"scores of {figures.pairs} pairs: accuracy {share(figures.accuracy, plain=True)} (trained "
        f"{share(figures.trained_accuracy, plain=True)}), order flipped in {share(figures.flips, plain=True)}, "
        f"difference {plain(figures.mean_difference)} on average and {plain(figures.max_difference)} at most "
        f"(trained scores vary by {plain(figures.trained_spread)}), correlation {plain(figures.correlation)}"
    )
