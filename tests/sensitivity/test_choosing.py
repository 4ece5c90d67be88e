"""A knapsack with a choice for each matrix, beside all choices that there are."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from edgetune.sensitivity.onnx import knapsack
from edgetune.sensitivity.onnx.candidates import CANDIDATES, COARSEST, F32_ACTIVATIONS, FINEST, Matrix
from edgetune.sensitivity.onnx.knapsack import MatrixErrors
from edgetune_converters.onnx.layout import SourceTensor
from edgetune_converters.onnx.storage import NBitsBlocks

FEW = CANDIDATES[::3]
COARSE_IN_F32 = NBitsBlocks(4, 128, symmetric=False, accuracy=F32_ACTIVATIONS)


def matrix(number: int, rows: int = 64) -> Matrix:
    source = SourceTensor(number, ("ffn_down", number, "weight"), (rows, 1024), "F32")
    return Matrix(f"matrix {number}", source.shape, (source,))


errors = st.lists(st.floats(0, 1, width=32), min_size=len(FEW), max_size=len(FEW))


@given(st.lists(st.tuples(st.integers(1, 64), errors), min_size=1, max_size=3), st.floats(0, 1.2))
def test_no_choice_is_better_by_more_than_one_step(given: list[tuple[int, list[float]]], share: float) -> None:
    """Filling along the hull loses at most the step that no longer fits."""
    measured = [
        MatrixErrors(matrix(number, rows), 1.0, dict(zip(FEW, found, strict=True)))
        for number, (rows, found) in enumerate(given)
    ]
    least = sum(min(each.matrix.cost(codes) for codes in FEW) for each in measured)
    most = sum(max(each.matrix.cost(codes) for codes in FEW) for each in measured)
    budget = least + share * (most - least)
    chosen = knapsack.choose(measured, budget)
    assert sum(matrix.cost(codes) for matrix, codes in chosen.items()) <= budget + 1e-6
    best = min(
        sum(each.errors[codes] for each, codes in zip(measured, combination, strict=True))
        for combination in product(FEW, repeat=len(measured))
        if sum(each.matrix.cost(codes) for each, codes in zip(measured, combination, strict=True)) <= budget
    )
    step = max(max(each.errors.values()) - min(each.errors.values()) for each in measured)
    assert best - 1e-9 <= knapsack.total_error(measured, chosen) <= best + step + 1e-9


def test_activations_in_f32_are_taken_where_they_are_what_costs() -> None:
    """They cost as much as twice the bytes: less than 8 bits."""
    rounded = dict.fromkeys(CANDIDATES, 1.0) | {COARSE_IN_F32: 0.1}
    lost = dict.fromkeys(CANDIDATES, 1.0) | {FINEST: 0.1}
    measured = [MatrixErrors(matrix(0), 1.0, rounded), MatrixErrors(matrix(1), 1.0, lost)]
    chosen = knapsack.choose(measured, 4 * matrix(0).cost(FINEST))
    assert list(chosen.values()) == [COARSE_IN_F32, FINEST]
    assert next(iter(knapsack.choose(measured, 0).values())).accuracy == COARSEST.accuracy
