"""Search for storage types: measure each matrix alone, choose at the cost of the fixed mix, and verify by an export.

An error is a mean KL divergence from the same merged model with all matrices in 8 bits, so that it does not contain the
error of the merge base. Two measurements give the error of a matrix in each storage type:

- the divergence of the logits with the coarsest storage in this matrix alone: one pass over some held-out rows;
- the squared error of the product of the matrix in each storage, on captured activations. To second order the
  divergence is proportional to it, so the first measurement gives the scale and this one the proportions.
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
from edgetune.sensitivity.onnx.candidates import CANDIDATES, COARSEST, FINEST, Matrix, fixed_mix, matrices_of
from edgetune.sensitivity.onnx.knapsack import Assignment, MatrixErrors
from edgetune.sensitivity.onnx.local_errors import LocalErrors
from edgetune_converters.model import Model
from edgetune_converters.onnx.plan import OnnxPlan, OnnxSettings
from edgetune_converters.onnx.storage import NBitsBlocks
from edgetune_converters.quantization.imatrix import ImportanceMatrix

Export = Callable[[OnnxSettings, Path], object]
"""Exports the model with some settings into a directory."""

_WORK = 6e13
"""Weights times tokens of all passes together: takes some minutes on two cores."""
_LEAST_TOKENS, _MOST_TOKENS = 256, 4096
_OF_A_ROW = 128  # scored tokens of a row, at most: many rows are more representative than one long row
_VERIFYING = 4  # times as many tokens to measure whole exports


@dataclass(frozen=True)
class Subject:
    """The model whose storage types are searched, and how it is exported."""

    model: Model
    """The merged model."""
    plan: OnnxPlan
    """With the fixed mix."""
    separate_plan: OnnxPlan
    """With query, key and value as matrices of their own."""
    export: Export
    rows: ScoredRows
    """The held-out rows on which errors are measured."""
    importance: ImportanceMatrix | None = None
    threads: int = 0


def search_types(subject: Subject, folder: Path, progress: Progress) -> OnnxSettings:
    """Return the settings of the int4 export with the least measured error that costs no more than the fixed mix.

    Args:
        subject: The model.
        folder: Where trial exports and activations are written; the caller removes it.
        progress: Counts steps.
    """
    matrices = matrices_of(subject.separate_plan)
    fixed = fixed_mix(subject.plan, matrices)
    steps = _StepCounter(progress, 2 * len(matrices) + 2 * _EXPORT)
    rows, whole = _rows_to_measure(subject.rows, matrices)
    local, alone, together = _measure(subject, matrices, rows, folder, steps)
    measured = [_errors(matrix, kld, local[matrix.name]) for matrix, kld in zip(matrices, alone, strict=True)]
    chosen = knapsack.choose(measured, sum(matrix.cost(codes) for matrix, codes in fixed.items()))
    settings = OnnxSettings(choices=_choices(measured, chosen, fixed))
    klds = [_export_divergence(subject, each, whole, folder, steps) for each in (OnnxSettings(), settings)]
    report = {
        "tokens": len(rows.positions),
        "tokens_of_the_whole": len(whole.positions),
        "kld_of_the_least": together,
        "kld_of_the_least_expected": float(sum(alone)),
        "kld_of_the_fixed_mix": klds[0],
        "kld_of_the_fixed_mix_expected": knapsack.total_error(measured, fixed),
        "kld_tuned": klds[1],
        "kld_tuned_expected": knapsack.total_error(measured, chosen),
    }
    return _with_report(settings, report, measured, chosen, fixed)


_EXPORT = 4  # steps of the progress bar for an export and its measurement


class _StepCounter:
    """The steps of the progress bar."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0.0

    def advance(self, steps: float = 1) -> None:
        self._done += steps
        self._progress(round(self._done), self._total)

    def within(self, steps: int) -> Progress:
        """Return a callback that fills some steps and counts in another unit."""
        start = self._done

        def update(done: int, total: int) -> None:
            self._done = start + steps * done / total
            self._progress(round(self._done), self._total)

        return update


# -- measurements ------------------------------------------------------------------------------------------------------


def _measure(
    subject: Subject, matrices: Sequence[Matrix], rows: ScoredRows, folder: Path, steps: _StepCounter
) -> tuple[Mapping[str, LocalErrors], list[float], float]:
    """Measure the errors of products in each storage, and of the logits with each matrix in the coarsest storage."""
    names = [matrix.name for matrix in matrices]
    whole, least = folder / "whole", folder / "least"
    subject.export(_uniform_settings(matrices, FINEST), whole)
    given = activations.capture(whole, names, rows, folder)
    local = local_errors.measure(
        subject.model, matrices, given, subject.importance, subject.threads, steps.within(len(matrices))
    )
    subject.export(_uniform_settings(matrices, COARSEST), least)
    graph = graphs.write_switching_graph(whole, least, names)
    shutil.rmtree(least)
    alone, together = swaps.measure(graph, names, rows, folder, steps.advance)
    return local, alone, together


def _errors(matrix: Matrix, alone: float, local: LocalErrors) -> MatrixErrors:
    scale = alone / local.swapped if local.swapped else 0.0
    return MatrixErrors(matrix, alone, {codes: scale * local.errors[codes] for codes in CANDIDATES})


def _export_divergence(
    subject: Subject, settings: OnnxSettings, rows: ScoredRows, folder: Path, steps: _StepCounter
) -> float:
    """Export with some settings and return the divergence from the model in 8 bits."""
    logits, path = folder / "logits.npy", folder / "trial"
    with load(folder / "whole", context=swaps.longest(rows)) as runtime:
        reference = swaps.StoredLogits(runtime, rows, logits)
    try:
        subject.export(settings, path)
        with load(path, context=swaps.longest(rows)) as runtime:
            return reference.divergence(runtime)
    finally:
        shutil.rmtree(path, ignore_errors=True)
        steps.advance(_EXPORT)


def _rows_to_measure(rows: ScoredRows, matrices: Sequence[Matrix]) -> tuple[ScoredRows, ScoredRows]:
    """Return rows for the pass of each matrix, and for whole exports: fewer for a larger model."""
    weights = sum(int(np.prod(matrix.shape)) for matrix in matrices)
    tokens = min(max(_WORK / (weights * len(matrices)), _LEAST_TOKENS), _MOST_TOKENS)
    return _first_rows(rows, int(tokens)), _first_rows(rows, int(tokens) * _VERIFYING)


def _first_rows(rows: ScoredRows, tokens: int) -> ScoredRows:
    """Return the first rows that a pass evaluates with about so many tokens; at least one row."""
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


# -- settings and report -----------------------------------------------------------------------------------------------


def _uniform_settings(matrices: Sequence[Matrix], storage: NBitsBlocks) -> OnnxSettings:
    """Return settings with one storage type for all matrices."""
    places = (place for matrix in matrices for place in matrix.slots)
    return OnnxSettings(apart=True, choices=dict.fromkeys(places, (storage, "a trial")))


def _choices(
    measured: Sequence[MatrixErrors], chosen: Assignment, fixed: Assignment
) -> dict[tuple[str, int], tuple[NBitsBlocks, str]]:
    return {
        place: (chosen[each.matrix], knapsack.reason(each, chosen[each.matrix], fixed[each.matrix]))
        for each in measured
        for place in each.matrix.slots
    }


def _with_report(
    settings: OnnxSettings,
    report: dict[str, Any],
    measured: Sequence[MatrixErrors],
    chosen: Assignment,
    fixed: Assignment,
) -> OnnxSettings:
    """Return the assignment, or the fixed mix if that is as good, with the report for the receipt."""
    better = report["kld_tuned"] < report["kld_of_the_fixed_mix"]
    report["kept"] = "the measured choice" if better else "the fixed mix, which was as good"
    report["matrices"] = {
        each.matrix.name: knapsack.receipt_entry(each, chosen[each.matrix], fixed[each.matrix]) for each in measured
    }
    return replace(settings if better else OnnxSettings(), type_search=report)
