"""Choosing: measure each matrix alone, choose under the bytes of the fixed mix, and measure the choice as a whole.

An error is a mean KL divergence from the same merged model with all matrices in 8 bits, so that what the merge base
costs is not in it. Two measurements make the error of a matrix in each storage:

- how far the least blocks, in this matrix alone, move the logits: one pass over some held-out rows for each matrix;
- how far each storage takes the matrix's own product, on captured activations, from the exact one: to second order the
  divergence grows with the square of that, so the first measurement gives the scale and this one the proportions.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.console import Progress
from edgetune.reference.scored_rows import ScoredRows
from edgetune.runtime import load
from edgetune.sensitivity.onnx import activations, graphs, knapsack, local_errors, swaps
from edgetune.sensitivity.onnx.candidates import CANDIDATES, LEAST, WHOLE, Matrix, fixed_mix, matrices_of
from edgetune.sensitivity.onnx.knapsack import Choice, Measured
from edgetune.sensitivity.onnx.local_errors import LocalErrors
from edgetune_converters.model import Model
from edgetune_converters.onnx.plan import OnnxPlan, OnnxSettings
from edgetune_converters.onnx.storage import NBitsBlocks
from edgetune_converters.quantization.imatrix import ImportanceMatrix

Make = Callable[[OnnxSettings, Path], object]

_WORK = 6e13
"""Weights times tokens of all passes together: some minutes on two cores."""
_LEAST_TOKENS, _MOST_TOKENS = 256, 4096
_OF_A_ROW = 128  # scored tokens, at most: many rows say more than one long one
_VERIFYING = 4  # times as many tokens for what is measured as a whole


@dataclass(frozen=True)
class Subject:
    """What is tuned: the merged model, the plan of the fixed mix, that with all matrices apart, and how to export."""

    model: Model
    plan: OnnxPlan
    separate_plan: OnnxPlan
    make: Make
    rows: ScoredRows
    importance: ImportanceMatrix | None = None
    threads: int = 0


def search_types(subject: Subject, folder: Path, progress: Progress) -> OnnxSettings:
    """The settings of an int4 export. What is needed on the way is written into `folder`; `progress` counts steps."""
    matrices = matrices_of(subject.separate_plan)
    fixed = fixed_mix(subject.plan, matrices)
    steps = _Steps(progress, 2 * len(matrices) + 2 * _EXPORT)
    rows, whole = _measured_rows(subject.rows, matrices)
    local, alone, together = _measure(subject, matrices, rows, folder, steps)
    measured = [_errors(matrix, kld, local[matrix.name]) for matrix, kld in zip(matrices, alone, strict=True)]
    chosen = knapsack.choose(measured, sum(matrix.cost(codes) for matrix, codes in fixed.items()))
    settings = OnnxSettings(choices=_as_choices(measured, chosen, fixed))
    klds = [_whole(subject, each, whole, folder, steps) for each in (OnnxSettings(), settings)]
    report = {
        "tokens": len(rows.positions),
        "tokens_of_the_whole": len(whole.positions),
        "kld_of_the_least": together,
        "kld_of_the_least_expected": float(sum(alone)),
        "kld_of_the_fixed_mix": klds[0],
        "kld_of_the_fixed_mix_expected": knapsack.total(measured, fixed),
        "kld_tuned": klds[1],
        "kld_tuned_expected": knapsack.total(measured, chosen),
    }
    return _settled(settings, report, measured, chosen, fixed)


_EXPORT = 4  # steps of the bar that an export and its measurement are worth


class _Steps:
    """The bar."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0.0

    def advance(self, steps: float = 1) -> None:
        self._done += steps
        self._progress(round(self._done), self._total)

    def within(self, steps: int) -> Progress:
        """A part of the bar for something that counts in another unit."""
        start = self._done

        def update(done: int, total: int) -> None:
            self._done = start + steps * done / total
            self._progress(round(self._done), self._total)

        return update


# -- measuring ---------------------------------------------------------------------------------------------------------


def _measure(
    subject: Subject, matrices: Sequence[Matrix], rows: ScoredRows, folder: Path, steps: _Steps
) -> tuple[Mapping[str, LocalErrors], list[float], float]:
    """What each matrix does: to its own product in each storage, and to the logits in the least blocks."""
    names = [matrix.name for matrix in matrices]
    whole, least = folder / "whole", folder / "least"
    subject.make(_all(matrices, WHOLE), whole)
    given = activations.capture(whole, names, rows, folder)
    local = local_errors.measure(
        subject.model, matrices, given, subject.importance, subject.threads, steps.within(len(matrices))
    )
    subject.make(_all(matrices, LEAST), least)
    graph = graphs.switching(whole, least, names)
    shutil.rmtree(least)
    alone, together = swaps.measure(graph, names, rows, folder, steps.advance)
    return local, alone, together


def _errors(matrix: Matrix, alone: float, local: LocalErrors) -> Measured:
    scale = alone / local.swapped if local.swapped else 0.0
    return Measured(matrix, alone, {codes: scale * local.errors[codes] for codes in CANDIDATES})


def _whole(subject: Subject, settings: OnnxSettings, rows: ScoredRows, folder: Path, steps: _Steps) -> float:
    """The divergence of a whole export from that in 8 bits."""
    told, path = folder / "told.npy", folder / "trial"
    with load(folder / "whole", context=swaps.longest(rows)) as runtime:
        reference = swaps.Told(runtime, rows, told)
    try:
        subject.make(settings, path)
        with load(path, context=swaps.longest(rows)) as runtime:
            return reference.divergence(runtime)
    finally:
        shutil.rmtree(path, ignore_errors=True)
        steps.advance(_EXPORT)


def _measured_rows(rows: ScoredRows, matrices: Sequence[Matrix]) -> tuple[ScoredRows, ScoredRows]:
    """Rows for the passes of each matrix, and for those of whole models: fewer where a pass takes longer."""
    weights = sum(int(np.prod(matrix.shape)) for matrix in matrices)
    tokens = min(max(_WORK / (weights * len(matrices)), _LEAST_TOKENS), _MOST_TOKENS)
    return _limited(rows, int(tokens)), _limited(rows, int(tokens) * _VERIFYING)


def _limited(rows: ScoredRows, tokens: int) -> ScoredRows:
    """The first rows, up to so many tokens that a pass has to evaluate; at least one."""
    positions, spent, count = [], 0, 0
    for _, scored, where in rows:
        kept = rows.positions[where][:_OF_A_ROW]
        count += 1
        if len(kept):
            positions.append(kept)
            spent += int(scored[len(kept) - 1])
        if spent >= tokens:
            break
    end = rows.row_offsets[count]
    return ScoredRows(rows.tokens[:end], rows.row_offsets[: count + 1], np.concatenate(positions))


# -- what comes of it --------------------------------------------------------------------------------------------------


def _all(matrices: Sequence[Matrix], storage: NBitsBlocks) -> OnnxSettings:
    """Settings that give all matrices a storage."""
    places = (place for matrix in matrices for place in matrix.places)
    return OnnxSettings(apart=True, choices=dict.fromkeys(places, (storage, "a trial")))


def _as_choices(
    measured: Sequence[Measured], chosen: Choice, fixed: Choice
) -> dict[tuple[str, int], tuple[NBitsBlocks, str]]:
    return {
        place: (chosen[each.matrix], knapsack.reason(each, chosen[each.matrix], fixed[each.matrix]))
        for each in measured
        for place in each.matrix.places
    }


def _settled(
    settings: OnnxSettings, report: dict[str, Any], measured: Sequence[Measured], chosen: Choice, fixed: Choice
) -> OnnxSettings:
    """The choice, or the fixed mix if it is no better; with what the receipt says."""
    better = report["kld_tuned"] < report["kld_of_the_fixed_mix"]
    report["kept"] = "the measured choice" if better else "the fixed mix, which was as good"
    report["matrices"] = {
        each.matrix.name: knapsack.report(each, chosen[each.matrix], fixed[each.matrix]) for each in measured
    }
    return replace(settings if better else OnnxSettings(), type_search=report)
