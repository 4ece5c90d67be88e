"""The gate: the thresholds that a file must meet, besides the contract and its provenance.

A threshold that is set and was not measured is neither met nor missed: the gate is then not passed, and the validation
warns. Only a miss is a failure (exit code 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from edgetune.config import GateConfig, parse_config
from edgetune.errors import ConfigError, GateFailure
from edgetune.validation.loss_stage import Chain, hint_of, stage_of
from edgetune.validation.results import TRAINED, Contract, Miss, Rung, Unmeasured


@dataclass(frozen=True)
class Threshold:
    """A figure of a rung and the side on which it must stay."""

    words: str
    value: Callable[[Sequence[Rung], Rung], float | None]
    """The figure; None where it was not measured, NaN where it is not defined."""
    is_maximum: bool
    title: str
    """For the head of a column."""
    is_share: bool = False
    """Whether it is shown in per cent."""
    digits: int = 3
    reason: str = ""
    """Why it may be unmeasured."""

    def is_met(self, value: float, limit: float) -> bool:
        """Whether the figure meets the limit; NaN meets none."""
        return value <= limit if self.is_maximum else value >= limit


def _recovery(_: Sequence[Rung], rung: Rung) -> float:
    return math.nan if rung.figures.recovery is None else rung.figures.recovery


def _task_drop(rungs: Sequence[Rung], rung: Rung) -> float | None:
    trained = next((each.task for each in rungs if each.name == TRAINED), None)
    return None if rung.task is None or trained is None else trained.share - rung.task.share


def _long_kld(_: Sequence[Rung], rung: Rung) -> float | None:
    return max((row.kld for row in rung.long_rows), default=None)


def _score_difference(_: Sequence[Rung], rung: Rung) -> float | None:
    return rung.scores.mean_difference if rung.scores else None


def _pair_flips(_: Sequence[Rung], rung: Rung) -> float | None:
    return rung.scores.flips if rung.scores else None


_NO_SCORES = "there are no scores: the run trained no reward model, or the file has no score head"

THRESHOLDS: Mapping[str, Threshold] = {
    "mean_kld_max": Threshold("mean KLD", lambda _, rung: rung.figures.kld.value, True, "Mean KLD"),
    "same_top_min": Threshold(
        "share of same top tokens", lambda _, rung: rung.figures.same_top.value, False, "Same top", is_share=True
    ),
    "perplexity_ratio_max": Threshold(
        "perplexity ratio", lambda _, rung: rung.figures.perplexity_ratio.value, True, "PPL ratio", digits=4
    ),
    "recovery_min": Threshold("recovery", _recovery, False, "Recovery", digits=4),
    "task_drop_max": Threshold(
        "drop of the task score", _task_drop, True, "Task drop", is_share=True,
        reason="the test rows were not answered (--no-task, or the run has none)",
    ),
    "agreement_min": Threshold(
        "agreement with greedy answers", lambda _, rung: rung.agreement.mean if rung.agreement else None, False,
        "Agreement", is_share=True, reason="the reference has no greedy answers",
    ),
    "long_kld_max": Threshold(
        "mean KLD of a long row", _long_kld, True, "KLD, long rows",
        reason="no long row was scored (--rows leaves them out; `edgetune reference RUN --long` adds them)",
    ),
    "score_difference_max": Threshold(
        "mean difference of the scores", _score_difference, True, "Score difference", reason=_NO_SCORES
    ),
    "pair_flips_max": Threshold(
        "share of pairs in another order", _pair_flips, True, "Pairs flipped", is_share=True, reason=_NO_SCORES
    ),
}  # fmt: skip
"""One row for each field of GateConfig; the report shows the same rows."""


@dataclass(frozen=True)
class GateResult:
    """The thresholds and checks that files miss, and the thresholds that were not measured."""

    misses: list[Miss] = field(default_factory=list)
    unmeasured: list[Unmeasured] = field(default_factory=list)


def parse(overrides: Sequence[str], config: Mapping[str, Any]) -> GateConfig:
    """Apply `key=value` overrides to the thresholds of the run's configuration; an empty value removes one."""
    given: dict[str, Any] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"--gate {override}: there is no value", "Write --gate mean_kld_max=0.05")
        given[key.strip()] = text.strip() or None
    return parse_config({**config, "gate": {**config.get("gate", {}), **given}}, "--gate").gate


def check(rungs: Sequence[Rung], gate: GateConfig) -> GateResult:
    """Check the contract, the provenance and the thresholds of every file among the rungs."""
    found = GateResult()
    for rung in (rung for rung in rungs if rung.file):
        found.misses.extend(_broken_contract(rung))
        found.misses.extend(
            Miss(rung=rung.name, figure="origin", stage="origin", sentence=sentence, hint=hint_of("origin"))
            for sentence in rung.mismatches
        )
        for key, limit in limits(gate.model_dump(), rung).items():
            value = THRESHOLDS[key].value(rungs, rung)
            if value is not None and not THRESHOLDS[key].is_met(value, limit):
                found.misses.append(_miss(rungs, rung, key, value, limit))
            elif value is None:
                found.unmeasured.append(Unmeasured(rung=rung.name, figure=key, reason=THRESHOLDS[key].reason))
    return found


def limits(gate: Mapping[str, float | None], rung: Rung) -> dict[str, float]:
    """Return the limits that a file must meet. Long rows must meet `mean_kld_max` unless `long_kld_max` is set."""
    found = {key: gate.get(key) for key in THRESHOLDS}
    if found["long_kld_max"] is None and rung.long_rows:
        found["long_kld_max"] = gate.get("mean_kld_max")
    return {key: limit for key, limit in found.items() if limit is not None}


def _broken_contract(rung: Rung) -> list[Miss]:
    stages = {"template": "template", "rendering": "template"}
    found = []
    for difference in (rung.contract or Contract()).differences:
        stage = stages.get(difference.what, "tokenizer")
        sentence = f"contract: {difference.what}: {difference.detail}"
        found.append(Miss(rung=rung.name, figure="contract", stage=stage, sentence=sentence, hint=hint_of(stage)))
    return found


def _miss(rungs: Sequence[Rung], rung: Rung, key: str, value: float, limit: float) -> Miss:
    threshold = THRESHOLDS[key]
    stage = stage_of(Chain.of(rungs, rung), partial(_misses, rungs, threshold, limit))
    compared = f"{value:.4g}, {'above' if threshold.is_maximum else 'below'} the limit of"
    undefined = "not defined (training gained nothing on these rows); the limit is"
    return Miss(
        rung=rung.name,
        figure=key,
        stage=stage,
        sentence=f"{threshold.words} is {undefined if math.isnan(value) else compared} {limit:g} ({key})",
        value=value,
        limit=limit,
        is_maximum=threshold.is_maximum,
        hint=hint_of(stage),
    )


def _misses(rungs: Sequence[Rung], threshold: Threshold, limit: float, rung: Rung) -> bool:
    value = threshold.value(rungs, rung)
    return value is not None and not threshold.is_met(value, limit)


def raise_on(misses: Sequence[Miss]) -> None:
    """Raise GateFailure (exit code 3) with every miss."""
    if not misses:
        return
    lines = [f"{miss.rung}: {miss.sentence}; lost at: {miss.stage}" for miss in misses]
    message = lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} checks failed:", *lines])
    raise GateFailure(message, misses[0].hint)


def unmeasured_warnings(unmeasured: Sequence[Unmeasured]) -> list[str]:
    """Return one line for each threshold that was not measured, with the files it concerns."""
    files: dict[tuple[str, str], list[str]] = {}
    for each in unmeasured:
        files.setdefault((each.figure, each.reason), []).append(each.rung)
    return [
        f"{', '.join(names)}: {figure} is set and was not measured: {reason}; the gate is not passed"
        for (figure, reason), names in files.items()
    ]
