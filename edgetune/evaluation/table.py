"""The scores of an evaluation as a table: for the terminal, the report page and the model card."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from edgetune.evaluation.results import EvaluationResults, TaskMetric, TaskScores
from edgetune.validation.numbers import with_error
from edgetune.validation.results import Mean

_SIDE_BY_SIDE = 2
"""Models that fit beside each other on a terminal."""


@dataclass(frozen=True)
class ScoreRow:
    """One metric of one task: a score for each model, and a difference for each file."""

    task: str
    metric: str
    direction: str
    """↑ if higher is better, ↓ if lower is, empty where the task does not say."""
    documents: int
    scores: list[Mean]
    differences: list[Mean | None]


def score_rows(results: EvaluationResults) -> Iterator[ScoreRow]:
    """Yield a row for each metric of each task, in the order of the tasks."""
    for scores in results.tasks:
        for metric in scores.metrics:
            yield ScoreRow(
                scores.task, _metric_name(metric), _direction(metric), scores.documents,
                [metric.scores[name] for name in results.models],
                [metric.differences.get(name) for name in results.files],
            )  # fmt: skip


def _metric_name(metric: TaskMetric) -> str:
    return metric.name if metric.filter == "none" else f"{metric.name} ({metric.filter})"


def _direction(metric: TaskMetric) -> str:
    return {True: "↑", False: "↓", None: ""}[metric.higher_is_better]


def has_differences(results: EvaluationResults) -> bool:
    """Whether files stand beside the trained model."""
    return any(metric.differences for scores in results.tasks for metric in scores.metrics)


def describe_settings(results: EvaluationResults) -> str:
    """Return how the prompts were made, in one sentence without a period."""
    stated = results.settings
    shots = {_shots(scores) for scores in results.tasks if not scores.is_group}
    parts = [
        f"lm-evaluation-harness {results.harness}",
        " and ".join(sorted(shots)),
        "with the chat template" if stated.apply_chat_template else "without a chat template",
    ]
    if stated.limit is not None:
        parts.append(f"the first {stated.limit} documents of each task")
    return ", ".join(part for part in parts if part)


def _shots(scores: TaskScores) -> str:
    return "1 example" if scores.num_fewshot == 1 else f"{scores.num_fewshot or 'no'} examples"


def format_table(results: EvaluationResults) -> RenderableType:
    """Return the table for the terminal: one line for each metric, or, with several files, one for each model."""
    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    grid.add_column("task", overflow="fold")
    grid.add_column("metric", no_wrap=True)
    grid.add_column("n", justify="right", no_wrap=True)
    compared = has_differences(results)
    if len(results.models) <= _SIDE_BY_SIDE:
        titles = [*results.models, *(["difference"] if compared else [])]
        lines = (
            (*_head(row), *(with_error(score, plain=True) for score in row.scores), *_formatted(row.differences))
            for row in score_rows(results)
        )
    else:
        grid.add_column("model", overflow="fold")
        titles = ["score", *(["difference"] if compared else [])]
        lines = (line for row in score_rows(results) for line in _lines(row, results))
    for title in titles:
        grid.add_column(title, justify="right", overflow="fold")
    for line in lines:
        grid.add_row(*map(Text, line))
    return grid


def _head(row: ScoreRow) -> tuple[str, str, str]:
    return row.task, f"{row.metric} {row.direction}".rstrip(), str(row.documents)


def _formatted(differences: Sequence[Mean | None]) -> Iterator[str]:
    return (signed(each, plain=True) for each in differences if each is not None)


def _lines(row: ScoreRow, results: EvaluationResults) -> Iterator[tuple[str, ...]]:
    """Yield a line for each model; the task stands on the first one."""
    differences = dict(zip(results.files, row.differences, strict=True))
    head = _head(row)
    for name, score in zip(results.models, row.scores, strict=True):
        yield *head, name, with_error(score, plain=True), *_formatted([differences.get(name)])
        head = ("", "", "")


def signed(difference: Mean, *, plain: bool = False) -> str:
    """Format a difference with its sign and its standard error."""
    text = with_error(difference, plain=plain)
    return f"+{text}" if difference.value > 0 else text
