"""Thresholds: which figures of which rung miss them, and where on the way the loss happened."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.config import GateConfig, parse_config
from edgetune.errors import ConfigError, GateFailure
from edgetune.validation.ladder import Ladder, Rung


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
}


@dataclass(frozen=True)
class Miss:
    """A threshold that a file misses."""

    rung: str
    figure: str
    stage: str
    """Where it was lost: template, tokenizer, merge or convert, quantize."""
    sentence: str


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


def _missed(ladder: Ladder, rung: Rung, gate: GateConfig) -> list[Miss]:
    found = []
    for key, threshold in THRESHOLDS.items():
        limit: float | None = getattr(gate, key)
        value = threshold.value(ladder, rung)
        if limit is None or value is None or threshold.met(value, limit):
            continue
        side = "most" if threshold.is_maximum else "least"
        sentence = f"{threshold.words} is {_number(value)}, at {side} {limit:g} was asked for ({key})"
        found.append(Miss(rung.name, key, stage_of(ladder, rung, gate), sentence))
    return found


def _number(value: float) -> str:
    return "not defined (training gained nothing on these rows)" if math.isnan(value) else f"{value:.4g}"


def stage_of(ladder: Ladder, rung: Rung, gate: GateConfig) -> str:
    """Where a loss appeared: an unquantized file of the same run, if there is one, tells merging from quantizing."""
    if not rung.is_quantized:
        return "merge or convert"
    whole = [other for other in ladder.files if not other.is_quantized]
    if not whole:
        return "merge, convert or quantize (validate an f16 export beside it to tell which)"
    return "merge or convert" if any(_missed(ladder, other, gate) for other in whole) else "quantize"


def raise_on(found: Sequence[Miss]) -> None:
    """GateFailure (exit code 3) with every miss."""
    if not found:
        return
    lines = [f"{miss.rung}: {miss.sentence}; lost at: {miss.stage}" for miss in found]
    message = lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} checks failed:", *lines])
    raise GateFailure(message, HINTS[found[0].stage.split(" ")[0].rstrip(",")])


HINTS = {
    "origin": "Validate a file against the run that it was exported from, or export it again.",
    "template": "Export again from the run directory; its tokenizer/ holds the template of training.",
    "tokenizer": "Export again from the run directory; if it stays, this tokenizer cannot be shipped: report it.",
    "merge": "Export with -q f16 and validate that too: it tells a wrong merge from a coarse type.",
    "quantize": "Export with a finer type (-q q5_k_m, q6_k or q8_0), or train longer.",
}
