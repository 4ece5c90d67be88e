"""Run models through lm-evaluation-harness and put their scores side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lm_eval.api.metrics import mean as arithmetic_mean
from lm_eval.evaluator import evaluate

from edgetune.console import Progress
from edgetune.errors import ConfigError
from edgetune.evaluation import tasks as task_loading
from edgetune.evaluation.harness_model import HarnessModel, PromptSettings
from edgetune.evaluation.models import EvaluatedModel
from edgetune.evaluation.results import TRAINED, TaskMetric, TaskScores, Truncation, mean
from edgetune.validation.results import Mean

_RESAMPLES = 1000
_SLOW_RESAMPLES = 100
_SLOW = ("bleu", "chrf", "chrf++", "ter")
"""Metrics of a whole corpus, for which the harness too takes fewer resamples."""

MetricKey = tuple[str, str, str]
"""(task or group, metric, filter)."""


@dataclass(frozen=True)
class ModelScores:
    """What the harness measured of one model."""

    name: str
    results: Mapping[str, Any]
    """As `lm_eval.evaluator.evaluate` returns them."""
    values: dict[MetricKey, list[Any]]
    """What each document contributes to each metric, in the order of the documents."""
    prompt_digests: list[bytes] = field(repr=False)
    truncated: int = 0


def run_model(
    model: EvaluatedModel,
    loaded: Mapping[str, Any],
    settings: PromptSettings,
    limit: int | None,
    progress: Progress,
) -> ModelScores:
    """Evaluate one model on loaded tasks.

    Raises:
        ConfigError: A task cannot be evaluated: it runs generated code, wants images, or samples.
    """
    task_loading.seed(list(loaded["tasks"].values()))
    harness_model = HarnessModel(model, settings, progress)
    try:
        results = evaluate(
            harness_model, dict(loaded), limit=limit, bootstrap_iters=_RESAMPLES, log_samples=True,
            apply_chat_template=settings.chat_template is not None, fewshot_as_multiturn=True,
        )  # fmt: skip
    except (ValueError, AssertionError) as error:  # both are the harness's words for what a task cannot do
        raise ConfigError(
            f"the tasks cannot be evaluated: {' '.join(str(error).split())}", "Choose other tasks with --tasks"
        ) from None
    assert results is not None
    values = {
        (task, metric, filter_): list(each)
        for task, samples in results["samples"].items()
        for (metric, filter_), each in _by_metric(samples).items()
    }
    return ModelScores(model.name, results, values, harness_model.prompt_digests, harness_model.truncated)


def _by_metric(samples: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[Any]]:
    found: dict[tuple[str, str], list[Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            found.setdefault((metric, sample["filter"]), []).append(sample[metric])
    return found


# -- side by side ------------------------------------------------------------------------------------------------------


def combine(models: Sequence[ModelScores], loaded: Mapping[str, Any]) -> list[TaskScores]:
    """Return the scores of all models, and the differences of files from the trained model where that is among them."""
    first = models[0].results
    groups = [name for name in loaded["groups"] if name in first["results"]]
    scored = [_task_scores(name, models, loaded["tasks"][name]) for name in loaded["tasks"]]
    return scored + [_group_scores(name, models, loaded["groups"][name], scored) for name in groups]


def truncations(models: Sequence[ModelScores]) -> dict[str, Truncation]:
    """Return what did not go to a model as the task wrote it, by model."""
    expected = models[0].prompt_digests
    found = {
        model.name: Truncation(
            prompts=model.truncated,
            other_tokens=sum(one != other for one, other in zip(expected, model.prompt_digests, strict=True)),
        )
        for model in models
    }
    return {name: each for name, each in found.items() if each.prompts or each.other_tokens}


def _task_scores(name: str, models: Sequence[ModelScores], task: Any) -> TaskScores:
    results = models[0].results
    return TaskScores(
        task=name,
        version=str(results["versions"].get(name, "")),
        documents=int(results["n-samples"][name]["effective"]),
        num_fewshot=int(results["n-shot"].get(name) or 0),
        metrics=list(_metrics(name, models, lambda key: _paired_differences(key, models, task))),
    )


def _group_scores(name: str, models: Sequence[ModelScores], group: Any, scored: Sequence[TaskScores]) -> TaskScores:
    leaves = {task.task_name for task in group.get_all_tasks()}
    members = [scores for scores in scored if scores.task in leaves]
    metrics = list(_metrics(name, models, lambda key: _group_differences(key, models, members)))
    used = {metric.name for metric in metrics}
    return TaskScores(
        task=name,
        is_group=True,
        version=str(models[0].results["versions"].get(name) or ""),
        documents=sum(scores.documents for scores in members if used & {metric.name for metric in scores.metrics}),
        metrics=metrics,
    )


def _metrics(
    name: str, models: Sequence[ModelScores], differences: Callable[[MetricKey], dict[str, Mean]]
) -> Iterator[TaskMetric]:
    stated = models[0].results["results"][name]
    higher = models[0].results["higher_is_better"].get(name) or {}
    for entry in stated:
        metric, comma, filter_ = entry.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        scores = {
            model.name: mean(
                model.results["results"][name].get(entry),
                model.results["results"][name].get(f"{metric}_stderr,{filter_}"),
            )
            for model in models
        }
        if all(math.isnan(score.value) for score in scores.values()):
            continue
        yield TaskMetric(
            name=metric, filter=filter_, higher_is_better=higher.get(metric), scores=scores,
            differences=differences((name, metric, filter_)),
        )  # fmt: skip


def _pairs(models: Sequence[ModelScores]) -> Iterator[tuple[ModelScores, ModelScores]]:
    """Yield (trained model, file) for each file; nothing where the trained model was not evaluated."""
    trained = next((model for model in models if model.name == TRAINED), None)
    if trained is not None:
        yield from ((trained, model) for model in models if model is not trained)


def _paired_differences(key: MetricKey, models: Sequence[ModelScores], task: Any) -> dict[str, Mean]:
    aggregate = task.aggregation().get(key[1], arithmetic_mean)
    return {
        file.name: paired_difference(aggregate, trained.values[key], file.values[key], key[1])
        for trained, file in _pairs(models)
    }


def paired_difference(
    aggregate: Callable[[list[Any]], float], trained: list[Any], file: list[Any], metric: str = ""
) -> Mean:
    """Return score of the file minus score of the trained model, with the standard error of the paired difference.

    Both models answered the same documents, so the error is that of the differences by document: in closed form for a
    mean, by bootstrap over documents for any other aggregation.
    """
    value = float(aggregate(file)) - float(aggregate(trained))
    count = len(file)
    if count < 2:
        return Mean(value=value)
    if aggregate is arithmetic_mean:
        changes = np.asarray(file, np.float64) - np.asarray(trained, np.float64)
        return Mean(value=value, error=float(changes.std(ddof=1) / math.sqrt(count)))
    generator = np.random.default_rng(0)
    drawn = [
        float(aggregate([file[i] for i in rows])) - float(aggregate([trained[i] for i in rows]))
        for rows in generator.integers(0, count, (_SLOW_RESAMPLES if metric in _SLOW else _RESAMPLES, count))
    ]
    return Mean(value=value, error=float(np.std(drawn, ddof=1)))


def _group_differences(key: MetricKey, models: Sequence[ModelScores], members: Sequence[TaskScores]) -> dict[str, Mean]:
    """Return the differences of a group; its error follows where the group is a mean over all documents."""
    name, metric, filter_ = key
    entry = f"{metric},{filter_}"
    found = {}
    for trained, file in _pairs(models):
        value = file.results["results"][name][entry] - trained.results["results"][name][entry]
        parts = [
            (scores.documents, each.differences[file.name])
            for scores in members
            for each in scores.metrics
            if (each.name, each.filter) == (metric, filter_)
        ]
        total = sum(count for count, _ in parts)
        pooled = sum(count * part.value for count, part in parts) / total if total else math.nan
        error = math.sqrt(sum((count * part.error) ** 2 for count, part in parts)) / total if total else math.nan
        found[file.name] = Mean(value=value, error=error if math.isclose(pooled, value, abs_tol=1e-9) else math.nan)
    return found
