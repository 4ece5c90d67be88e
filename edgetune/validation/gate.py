"""Thresholds: which figures of which rung miss them, and where on the way the loss happened."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from edgetune.config import GateConfig, parse_config
from edgetune.errors import ConfigError, GateFailure
from edgetune.validation.loss_stage import Chain, hint_of, stage_of
from edgetune.validation.rungs import Ladder, Rung


@dataclass(frozen=True)
class Threshold:
    """A figure and the side on which it must stay."""

    words: str
    value: Callable[[Ladder, Rung], float | None]
    is_maximum: bool
    form: str = ".4g"

    def met(self, value: float, limit: float) -> bool:
        """NaN meets nothing."""
        return value <= limit if self.is_maximum else value >= limit


def _long_kld(_: Ladder, rung: Rung) -> float | None:
    return max((row.kld for row in rung.long_rows), default=None)


def _task_drop(ladder: Ladder, rung: Rung) -> float | None:
    if rung.task is None or ladder.trained.task is None:
        return None  # not measured
    return ladder.trained.task.share - rung.task.share


# One row a field of GateConfig, of the same name; a test holds the two together.
THRESHOLDS = {
    "mean_kld_max": Threshold("mean KLD", lambda _, rung: rung.figures.kld.value, True),
    "same_top_min": Threshold("share of same top tokens", lambda _, rung: rung.figures.same_top.value, False),
    "perplexity_ratio_max": Threshold("perplexity ratio", lambda _, rung: rung.figures.perplexity_ratio.value, True),
    "recovery_min": Threshold(
        "recovery", lambda _, rung: math.nan if rung.figures.recovery is None else rung.figures.recovery, False
    ),
    "task_drop_max": Threshold("drop of the task score", _task_drop, True),
    "agreement_min": Threshold(
        "agreement with greedy answers", lambda _, rung: rung.agreement.mean if rung.agreement else None, False
    ),
    "long_kld_max": Threshold("mean KLD of a long row", _long_kld, True),
}


@dataclass(frozen=True)
class Miss:
    """A threshold that a file misses."""

    rung: str
    figure: str
    stage: str
    """Where it was lost: template, tokenizer, merge or convert, quantize."""
    sentence: str
    value: float | None = None
    limit: float | None = None
    is_maximum: bool | None = None

    @property
    def hint(self) -> str:
        """What to do next."""
        return hint_of(self.stage)


def parse(overrides: Sequence[str], config: Mapping[str, Any]) -> GateConfig:
    """`key=value` overrides on the thresholds of the run's configuration; an empty value takes one away."""
    given: dict[str, Any] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"--gate {override}: there is no value", "Write --gate mean_kld_max=0.05")
        given[key.strip()] = text.strip() or None
    return parse_config({**config, "gate": {**config.get("gate", {}), **given}}, "--gate").gate


def misses(ladder: Ladder, gate: GateConfig) -> list[Miss]:
    """Every miss of every file: contract, origin, figures."""
    found = [(*_broken_contract(rung), *_foreign(rung), *_missed(ladder, rung, gate)) for rung in ladder.files]
    return [miss for each in found for miss in each]


def _foreign(rung: Rung) -> list[Miss]:
    return [Miss(rung.name, "origin", "origin", sentence) for sentence in rung.mismatches]


def _broken_contract(rung: Rung) -> list[Miss]:
    stages = {"template": "template", "rendering": "template"}
    return [
        Miss(rung.name, "contract", stages.get(each.what, "tokenizer"), f"contract: {each.what}: {each.detail}")
        for each in (rung.contract.differences if rung.contract else [])
    ]


def limits(gate: GateConfig) -> dict[str, float]:
    """What is asked for; a long row must meet what every row must unless something else is said."""
    found = {key: getattr(gate, key) for key in THRESHOLDS}
    if found["long_kld_max"] is None:
        found["long_kld_max"] = gate.mean_kld_max
    return {key: limit for key, limit in found.items() if limit is not None}


def _missed(ladder: Ladder, rung: Rung, gate: GateConfig) -> list[Miss]:
    found = []
    for key, limit in limits(gate).items():
        threshold = THRESHOLDS[key]
        value = threshold.value(ladder, rung)
        if value is None or threshold.met(value, limit):
            continue
        side = "most" if threshold.is_maximum else "least"
        sentence = f"{threshold.words} is {_number(value)}, at {side} {limit:g} was asked for ({key})"
        stage = stage_of(Chain.of(ladder, rung), partial(_misses, ladder, threshold, limit))
        found.append(Miss(rung.name, key, stage, sentence, value, limit, threshold.is_maximum))
    return found


def _misses(ladder: Ladder, threshold: Threshold, limit: float, rung: Rung) -> bool:
    value = threshold.value(ladder, rung)
    return value is not None and not threshold.met(value, limit)


def _number(value: float) -> str:
    return "not defined (training gained nothing on these rows)" if math.isnan(value) else f"{value:.4g}"


def raise_on(found: Sequence[Miss]) -> None:
    """GateFailure (exit code 3) with every miss."""
    if not found:
        return
    lines = [f"{miss.rung}: {miss.sentence}; lost at: {miss.stage}" for miss in found]
    message = lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} checks failed:", *lines])
    raise GateFailure(message, found[0].hint)
