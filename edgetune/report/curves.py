"""The training log as curves, thinned for drawing."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgetune.objectives import OBJECTIVES
from edgetune.validation.numbers import number, short

Points = list[tuple[float, float]]
POINTS = 500
"""The most points that a curve keeps."""
_RISE = 1.05
_FALL = 0.97


@dataclass(frozen=True)
class FigureCurve:
    """A figure of the objective over the steps, in training and on held-out rows."""

    name: str
    meaning: str
    training: Points
    held_out: Points


@dataclass(frozen=True)
class Curves:
    """The values that the trainer logged, as (step, value)."""

    loss: Points
    held_out: Points
    learning_rate: Points
    grad_norm: Points
    figures: list[FigureCurve] = field(default_factory=list)
    """Figures of the objective that were logged."""
    loss_unit: str = ""
    is_generated: bool = False
    """Whether the model answered prompts in training, so that its loss is no measure of success."""

    @property
    def held_out_rows(self) -> list[tuple[float, list[float | None]]]:
        """Each evaluation: its step, the held-out loss and the figures of the objective."""
        columns = [dict(self.held_out), *(dict(figure.held_out) for figure in self.figures)]
        steps = sorted({step for column in columns for step in column})
        return [(step, [column.get(step) for column in columns]) for step in steps]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not (self.loss or self.held_out)

    @property
    def finding(self) -> str:
        """Whether training was too short or too long: by the held-out loss, or by the reward of answers."""
        if self.is_generated:
            return self._reward_finding
        if len(self.held_out) < 2:
            return "There are too few evaluations on held-out rows to tell whether training was long enough."
        values = [value for _, value in self.held_out]
        best, last = min(self.held_out, key=lambda point: point[1]), self.held_out[-1]
        if last[1] > _RISE * best[1]:
            return (
                f"The held-out loss rises after step {best[0]:,.0f} (from {best[1]:.4g} to {last[1]:.4g} at the end): "
                "train for fewer epochs or with a lower learning rate."
            )
        if last[1] < _FALL * values[-2]:
            fall = f"{values[-2]:.4g} to {last[1]:.4g}"
            return f"The held-out loss was still falling at the end ({fall}): another epoch may lower it further."
        return f"The held-out loss has leveled off at {last[1]:.4g} and does not rise: training was long enough."

    @property
    def _reward_finding(self) -> str:
        reward = next((figure for figure in self.figures if figure.name == "reward"), None)
        points = reward and (reward.held_out if len(reward.held_out) > 1 else reward.training)
        if not points:
            return "No reward was logged; the loss of this objective is no measure of success."
        before, after = points[0][1], points[-1][1]
        change = "rose" if after > before else "fell" if after < before else "stayed"
        where = "held-out prompts" if reward and points is reward.held_out else "the prompts of training"
        return (
            f"The mean reward of answers to {where} {change} from {short(before)} to {short(after)}; the loss of this "
            "objective is no measure of success."
        )


def curves(log: Sequence[Mapping[str, Any]], objective: str = "sft") -> Curves:
    """Return the curves of a log; a key that was not logged gives an empty one.

    Args:
        log: The lines of metrics.jsonl.
        objective: `objective.kind` of the run; one that is not known has no figures.
    """
    names = ("loss", "eval_loss", "learning_rate", "grad_norm")
    loss, held_out, rate, norm = (thinned(_points(log, name)) for name in names)
    known = OBJECTIVES.get(objective)
    if known is None:
        return Curves(loss, held_out, rate, norm)
    found = [
        FigureCurve(
            metric.title, metric.meaning, thinned(_points(log, metric.name)),
            thinned(_points(log, f"eval_{metric.name}")),
        )
        for metric in known.facts.metrics
    ]  # fmt: skip
    figures = [figure for figure in found if figure.training or figure.held_out]
    return Curves(loss, held_out, rate, norm, figures, known.facts.loss_unit, known.facts.generates)


def _points(log: Sequence[Mapping[str, Any]], name: str) -> Points:
    pairs = ((number(line.get("step")), number(line.get(name))) for line in log)
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def thinned(points: Points, most: int = POINTS) -> Points:
    """Return at most `most` points, each the mean of equally many neighbors; the first and the last value are kept."""
    if len(points) <= most:
        return points
    inner, buckets = points[1:-1], most - 2
    bounds = [round(index * len(inner) / buckets) for index in range(buckets + 1)]
    groups = [inner[low:high] for low, high in itertools.pairwise(bounds)]
    means = [(group[len(group) // 2][0], sum(value for _, value in group) / len(group)) for group in groups]
    return [points[0], *means, points[-1]]
