"""Which storage each matrix gets: bytes are spent where they take away most of the measured error.

Errors of several matrices are taken to add up, which holds to second order for errors that know nothing of each other;
so the least sum under a budget is a knapsack with a choice for each matrix. It is filled from the cheapest choice on,
always by the step that gains most for its cost: the steps along the lower convex hull of each matrix, which is optimal
but for the last step that no longer fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgetune.sensitivity.onnx.candidates import Matrix, label
from edgetune_converters.onnx.storage import NBitsBlocks

_ALTERNATIVES = 3  # that a receipt names beside each choice


@dataclass(frozen=True)
class Measured:
    """What each storage of a matrix adds to the mean KL divergence, in nats; `alone` is what was measured of LEAST."""

    matrix: Matrix
    alone: float
    errors: Mapping[NBitsBlocks, float]


Choice = Mapping[Matrix, NBitsBlocks]


def choose(measured: Sequence[Measured], budget: float) -> dict[Matrix, NBitsBlocks]:
    """The least sum of errors that does not cost more than the budget, or else what costs least."""
    chosen = {each.matrix: min(each.errors, key=lambda codes: (each.matrix.cost(codes), each.errors[codes]))
              for each in measured}  # fmt: skip
    left = budget - sum(matrix.cost(codes) for matrix, codes in chosen.items())
    while steps := [step for each in measured for step in _steps(each, chosen[each.matrix], left)]:
        _, spent, matrix, codes = max(steps, key=lambda step: step[0])
        chosen[matrix] = codes
        left -= spent
    return chosen


def _steps(each: Measured, now: NBitsBlocks, left: float) -> list[tuple[float, float, Matrix, NBitsBlocks]]:
    """What can be gained in a matrix: error for a unit of cost, the cost, and by which storage."""
    before, cost = each.errors[now], each.matrix.cost(now)
    return [
        (gain / spent if spent > 0 else float("inf"), spent, each.matrix, codes)
        for codes, error in each.errors.items()
        if (gain := before - error) > 0 and (spent := each.matrix.cost(codes) - cost) <= left
        and (spent > 0 or codes != now)
    ]  # fmt: skip


def total(measured: Sequence[Measured], choice: Choice) -> float:
    """What a choice is expected to cost, in nats."""
    return sum(each.errors[choice[each.matrix]] for each in measured)


def reason(each: Measured, chosen: NBitsBlocks, fixed: NBitsBlocks) -> str:
    """For plan and receipt."""
    said = f"measured: {each.errors[chosen]:.1e} nats"
    return said if chosen == fixed else f"{said}; {label(fixed)} of the fixed mix {each.errors[fixed]:.1e}"


def report(each: Measured, chosen: NBitsBlocks, fixed: NBitsBlocks) -> dict[str, object]:
    """What the receipt says of a matrix: the choice, and the measured errors of what stood beside it."""
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
