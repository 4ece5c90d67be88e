"""The storage type of each matrix: spend the budget where it reduces the measured error most.

The errors of several matrices are assumed to add up, which holds to second order for independent errors. The least sum
under a budget is then a multiple-choice knapsack. It is filled greedily from the cheapest storage of each matrix, by
the step with the largest gain per cost. These steps follow the lower convex hull of each matrix, so the result is
optimal except for the last step that does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgetune.sensitivity.onnx.candidates import Matrix, label
from edgetune_converters.onnx.storage import NBitsBlocks

_ALTERNATIVES = 3  # in the receipt, besides the chosen storage and that of the fixed mix


@dataclass(frozen=True)
class MatrixErrors:
    """The increase of the mean KL divergence, in nats, with each storage of one matrix."""

    matrix: Matrix
    alone: float
    """With COARSEST, as it was measured by a pass over held-out rows."""
    errors: Mapping[NBitsBlocks, float]


Assignment = Mapping[Matrix, NBitsBlocks]
"""The storage of each matrix."""


def choose(measured: Sequence[MatrixErrors], budget: float) -> dict[Matrix, NBitsBlocks]:
    """Return the assignment with the least sum of errors within the budget, or the cheapest one if none is."""
    chosen = {each.matrix: min(each.errors, key=lambda codes: (each.matrix.cost(codes), each.errors[codes]))
              for each in measured}  # fmt: skip
    left = budget - sum(matrix.cost(codes) for matrix, codes in chosen.items())
    while steps := [step for each in measured for step in _steps(each, chosen[each.matrix], left)]:
        _, spent, matrix, codes = max(steps, key=lambda step: step[0])
        chosen[matrix] = codes
        left -= spent
    return chosen


def _steps(each: MatrixErrors, now: NBitsBlocks, left: float) -> list[tuple[float, float, Matrix, NBitsBlocks]]:
    """Return the better storages of a matrix that the budget allows: gain per cost, cost, matrix, storage."""
    before, cost = each.errors[now], each.matrix.cost(now)
    return [
        (gain / spent if spent > 0 else float("inf"), spent, each.matrix, codes)
        for codes, error in each.errors.items()
        if (gain := before - error) > 0 and (spent := each.matrix.cost(codes) - cost) <= left
        and (spent > 0 or codes != now)
    ]  # fmt: skip


def total_error(measured: Sequence[MatrixErrors], choice: Assignment) -> float:
    """Return the expected error of an assignment, in nats."""
    return sum(each.errors[choice[each.matrix]] for each in measured)


def reason(each: MatrixErrors, chosen: NBitsBlocks, fixed: NBitsBlocks) -> str:
    """Return why the storage was chosen, for plan and receipt."""
    text = f"measured: {each.errors[chosen]:.1e} nats"
    return text if chosen == fixed else f"{text}; {label(fixed)} of the fixed mix {each.errors[fixed]:.1e}"


def receipt_entry(each: MatrixErrors, chosen: NBitsBlocks, fixed: NBitsBlocks) -> dict[str, object]:
    """Return the entry of a matrix in the receipt: its storage, and the measured errors of some alternatives."""
    others = sorted((codes for codes in each.errors if codes not in (chosen, fixed)),
                    key=lambda codes: abs(each.matrix.cost(codes) - each.matrix.cost(chosen)))  # fmt: skip
    shown = dict.fromkeys([chosen, fixed, *others[:_ALTERNATIVES]])
    return {
        "type": chosen.name,
        "accuracy_level": chosen.accuracy,
        "kld_alone": _digits(each.alone),
        "kld": {label(codes): _digits(each.errors[codes]) for codes in shown},
    }


def _digits(value: float) -> float:
    return float(f"{value:.3g}")
