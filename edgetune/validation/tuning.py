"""`merge-export --tune`: which block size each matrix of an int4 ONNX model gets, from errors measured on a run's rows.

An error is a mean KL divergence from the same merged model with all matrices in 8 bits, so that what the merge base
costs is not in it. How much of the error each group of matrices brings is measured by swapping it to 8 bits; how much
of an error each block size leaves, by giving it to all of them. The bytes of the fixed mix are then spent where they
gain most, and what comes of it is measured once more beside the fixed mix.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import edgetune_native
from edgetune.console import Progress
from edgetune.reference import Rows
from edgetune.runtime import Runtime, load
from edgetune_converters.onnx.places import Source
from edgetune_converters.onnx.plan import OnnxPlan, Settings
from edgetune_converters.onnx.storage import Codes

LEAST = Codes(4, 128, symmetric=False)
WHOLE = Codes(8, 128)
BETWEEN = (Codes(4, 64, symmetric=False), Codes(4, 32, symmetric=False))
TOKENS = 1024
"""Scored tokens on which each trial is measured, at most."""
KINDS: Mapping[str, tuple[str, ...]] = {
    "query and output": ("attention_q", "attention_qkv", "attention_output"),
    "key and value": ("attention_k", "attention_v"),
    "gate and up": ("ffn_gate", "ffn_up"),
    "down": ("ffn_down",),
}
_BANDED = 8  # layers from which the first and the last quarter are measured apart
_WORTH = 0.5  # share of the error that 8-bit activations must cause to be given up: they double the speed

Make = Callable[[Settings, Path], object]
Trial = Callable[[Settings], float]


@dataclass(frozen=True)
class Group:
    """Matrices of one kind in some layers; `error` is their part of the divergence."""

    name: str
    sources: tuple[Source, ...]
    error: float = 0.0

    def bytes(self, storage: Codes) -> int:
        """Their size in a storage."""
        return sum(form.bytes for source in self.sources for form in storage.forms(source.shape))


@dataclass
class Measured:
    """What trials gave: the error with everything in the least blocks, and what each larger storage leaves of it."""

    error: float
    left: dict[Codes, float] = field(default_factory=dict)


def tune(make: Make, plan: OnnxPlan, rows: Rows, folder: Path, progress: Progress) -> Settings:
    """The settings of an int4 export that `make` writes; `plan` is that of the fixed mix.

    Trials are written into `folder` and removed again; `progress` counts them.
    """
    groups = groups_of(plan)
    total = len(groups) + len(BETWEEN) + 4  # with the least blocks, the fixed mix, the choice, and that more exactly
    make(_all(groups, WHOLE), folder / "whole")
    with load(folder / "whole", context=_longest(rows)) as whole:
        trial = _Trials(make, whole, _enough(rows), folder / "trial", progress, total)
        measured, found = _measure(trial, groups)
        fixed = trial(Settings())
        chosen = _choose(found, measured, _budget(plan, groups))
        settings = Settings(choices=_as_choices(chosen, measured))
        tuned = trial(settings)
        if tuned >= fixed:
            settings = Settings()
        precise = trial(replace(settings, accuracy=1))
    best = min(tuned, fixed)
    if best - precise > _WORTH * best:
        settings = replace(settings, accuracy=1)
    shutil.rmtree(folder / "whole")
    return replace(settings, tuning=_report(chosen, measured, trial.tokens, fixed, tuned, precise, settings))


# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass
class _Trials:
    """Writes a model and measures how far it is from the whole one."""

    make: Make
    whole: Runtime
    rows: Rows
    path: Path
    progress: Progress
    total: int
    done: int = 0

    @property
    def tokens(self) -> int:
        """How many are measured."""
        return len(self.rows.positions)

    def __call__(self, settings: Settings) -> float:
        try:
            self.make(settings, self.path)
            with load(self.path, context=_longest(self.rows)) as runtime:
                kld = self._divergence(runtime)
        finally:
            shutil.rmtree(self.path, ignore_errors=True)
        self.done += 1
        self.progress(self.done, self.total)
        return kld

    def _divergence(self, runtime: Runtime) -> float:
        found = []
        for ids, positions, _ in self.rows:
            pairs = zip(self.whole.score(ids, positions), runtime.score(ids, positions), strict=True)
            for wanted, given in pairs:
                targets = np.zeros(len(wanted), np.int32)
                found.append(edgetune_native.compare(wanted, given, targets).kld)
        return float(np.concatenate(found).mean())


def _measure(trial: Trial, groups: Sequence[Group]) -> tuple[Measured, list[Group]]:
    """The error of the least blocks, each group's part of it, and what larger blocks leave."""
    error = trial(_all(groups, LEAST))
    measured = Measured(error, {LEAST: 1.0, WHOLE: 0.0})
    for storage in BETWEEN:
        measured.left[storage] = min(1.0, trial(_all(groups, storage)) / error) if error else 0.0
    without = [trial(_all(groups, LEAST, whole=group)) for group in groups]
    gains = np.maximum(error - np.array(without), 0)
    shares = gains / gains.sum() if gains.sum() else gains
    return measured, [replace(group, error=float(share)) for group, share in zip(groups, shares, strict=True)]


def _enough(rows: Rows) -> Rows:
    """The first rows, up to TOKENS scored tokens."""
    count = next((index for index, (_, _, where) in enumerate(rows, 1) if where.stop >= TOKENS), len(rows))
    return rows.first(count)


def _longest(rows: Rows) -> int:
    return int(max(len(ids) for ids, _, _ in rows))


# -- choosing ----------------------------------------------------------------------------------------------------------


def groups_of(plan: OnnxPlan) -> list[Group]:
    """The matrices that can be chosen for, by kind; of a deep model the first and last quarter of the layers apart."""
    sources = [part.source for weight, _ in plan.chosen for part in weight.parts if part.source.slot[2] == "weight"]
    layers = 1 + max(source.slot[1] or 0 for source in sources)
    ends = [0, layers // 4, layers - layers // 4, layers] if layers >= _BANDED else [0, layers]
    groups = []
    for kind, slots in KINDS.items():
        for first, last in pairwise(ends):
            within = [source for source in sources if source.slot[0] in slots and first <= (source.slot[1] or 0) < last]
            if within:
                groups.append(Group(f"{kind} of layers {first} to {last - 1}", tuple(within)))
    return groups


def _budget(plan: OnnxPlan, groups: Sequence[Group]) -> int:
    """The bytes that the fixed mix spends on the groups."""
    mine = {source for group in groups for source in group.sources}
    return sum(
        form.bytes
        for weight, storage in plan.chosen
        if {part.source for part in weight.parts} <= mine
        for form in storage.forms(weight.shape)
    )


def _choose(groups: Sequence[Group], measured: Measured, budget: int) -> dict[Group, Codes]:
    """Step after step the change that gains most error for a byte, as long as the bytes last."""
    chosen = dict.fromkeys(groups, LEAST)
    left = budget - sum(group.bytes(LEAST) for group in groups)
    while steps := [step for group in groups for step in _steps(group, chosen[group], measured) if step[1] <= left]:
        _, cost, group, storage = max(steps, key=lambda step: step[0] / step[1])
        chosen[group] = storage
        left -= cost
    return chosen


def _steps(group: Group, now: Codes, measured: Measured) -> list[tuple[float, int, Group, Codes]]:
    """What can be gained in a group: how much, for how many bytes, and by which storage."""
    steps = []
    for storage in (*BETWEEN, WHOLE):
        gain = group.error * (measured.left[now] - measured.left[storage])
        cost = group.bytes(storage) - group.bytes(now)
        if gain > 0 and cost > 0:
            steps.append((gain, cost, group, storage))
    return steps


def _all(groups: Sequence[Group], storage: Codes, whole: Group | None = None) -> Settings:
    """Settings that give all groups a storage, and one of them 8 bits."""
    stored = {group: WHOLE if group is whole else storage for group in groups}
    return Settings(
        choices={_place(source): (kind, "a trial") for group, kind in stored.items() for source in group.sources}
    )


def _place(source: Source) -> tuple[str, int]:
    slot, layer, _ = source.slot
    assert layer is not None
    return slot, layer


def _as_choices(chosen: Mapping[Group, Codes], measured: Measured) -> dict[tuple[str, int], tuple[Codes, str]]:
    return {
        _place(source): (storage, _reason(group, storage, measured))
        for group, storage in chosen.items()
        for source in group.sources
    }


def _reason(group: Group, storage: Codes, measured: Measured) -> str:
    return f"measured: {group.error:.0%} of the error comes from here, this leaves {measured.left[storage]:.0%} of it"


def _report(
    chosen: Mapping[Group, Codes],
    measured: Measured,
    tokens: int,
    fixed: float,
    tuned: float,
    precise: float,
    settings: Settings,
) -> dict[str, Any]:
    """What the receipt says."""
    return {
        "tokens": tokens,
        "kld_of_the_least": measured.error,
        "kld_of_the_fixed_mix": fixed,
        "kld_tuned": tuned,
        "kld_with_exact_activations": precise,
        "kept": "the measured choice" if settings.choices else "the fixed mix, which was as good",
        "accuracy_level": 4 if settings.accuracy is None else settings.accuracy,
        "choices": {
            group.name: {"type": storage.name, "why": _reason(group, storage, measured)}
            for group, storage in chosen.items()
        },
    }
