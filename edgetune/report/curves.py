"""The training log as curves, thin enough to be drawn."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from edgetune.report.gather import Json
from edgetune.report.numbers import number

Points = list[tuple[float, float]]
POINTS = 500
"""More points than a screen has columns for a chart are averaged."""
_RISE = 1.05
_FALL = 0.97


@dataclass(frozen=True)
class Curves:
    """What the trainer logged: (step, value)."""

    loss: Points
    held_out: Points
    learning_rate: Points
    grad_norm: Points

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not (self.loss or self.held_out)

    @property
    def finding(self) -> str:
        """What the held-out loss says about the length of training."""
        if len(self.held_out) < 2:
            return "There are too few evaluations on held-out rows to say whether training was long enough."
        values = [value for _, value in self.held_out]
        best, last = min(self.held_out, key=lambda point: point[1]), self.held_out[-1]
        if last[1] > _RISE * best[1]:
            return (
                f"The held-out loss rises after step {best[0]:,.0f} ({best[1]:.4g} there, {last[1]:.4g} at the end): "
                "train for fewer epochs or with a lower learning rate."
            )
        if last[1] < _FALL * values[-2]:
            fall = f"{values[-2]:.4g} to {last[1]:.4g}"
            return f"The held-out loss was still falling at the end ({fall}): another epoch may gain more."
        return f"The held-out loss has levelled off at {last[1]:.4g} without rising again: training was long enough."


def curves(log: Sequence[Json]) -> Curves:
    """The log's lines as curves; keys that were not logged give none."""
    names = ("loss", "eval_loss", "learning_rate", "grad_norm")
    loss, held_out, rate, norm = (thinned(_points(log, name)) for name in names)
    return Curves(loss, held_out, rate, norm)


def _points(log: Sequence[Json], name: str) -> Points:
    pairs = ((number(line.get("step")), number(line.get(name))) for line in log)
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def thinned(points: Points, most: int = POINTS) -> Points:
    """At most `most` points: each the mean of as many neighbours; the first and the last value stay as they were."""
    if len(points) <= most:
        return points
    inner, buckets = points[1:-1], most - 2
    bounds = [round(index * len(inner) / buckets) for index in range(buckets + 1)]
    groups = [inner[low:high] for low, high in itertools.pairwise(bounds)]
    means = [(group[len(group) // 2][0], sum(value for _, value in group) / len(group)) for group in groups]
    return [points[0], *means, points[-1]]
