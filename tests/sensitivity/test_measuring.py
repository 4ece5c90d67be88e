"""What is measured, beside the same measured in another way: whole exports, and products by numpy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import edgetune_native
from edgetune.runtime import load
from edgetune.sensitivity.onnx import activations, graphs, local_errors, search, swaps
from edgetune.sensitivity.onnx.candidates import CANDIDATES, COARSEST, F32_ACTIVATIONS, FINEST, Matrix, matrices_of
from edgetune_converters.onnx.plan import OnnxSettings
from tests.converters import family_models, tiny
from tests.sensitivity.test_type_search import EVEN, rows_of, subject


@pytest.fixture(scope="module", params=["llama-tied", "gpt2", "phi3"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[search.Subject, Path]:
    folder = tmp_path_factory.mktemp("measuring")
    if request.param == "llama-tied":
        return subject(tiny.base(request.param, folder / "base", **EVEN)), folder
    return subject(family_models.base(request.param, folder / "base")), folder


def settings(matrices: Sequence[Matrix], least: Sequence[str]) -> OnnxSettings:
    return OnnxSettings(
        apart=True,
        choices={
            place: (COARSEST if matrix.name in least else FINEST, "") for matrix in matrices for place in matrix.slots
        },
    )


def test_a_swap_is_an_export_with_one_matrix_in_other_blocks(made: tuple[search.Subject, Path]) -> None:
    """To the bit: the operators are the same, whichever graph they stand in."""
    subject, folder = made
    matrices = matrices_of(subject.separate_plan)
    names = [matrix.name for matrix in matrices]
    rows = rows_of(2, 40)
    for name, least in (("whole", []), ("least", names), ("one", names[1:2])):
        subject.export(settings(matrices, least), folder / name)
    with load(folder / "whole", context=40) as whole, load(folder / "one", context=40) as one:
        wanted = swaps.StoredLogits(whole, rows, folder / "told.npy").divergence(one)
    with load(folder / "whole", context=40) as whole, load(folder / "least", context=40) as least_of_all:
        everything = swaps.StoredLogits(whole, rows, folder / "told.npy").divergence(least_of_all)
    graph = graphs.write_switching_graph(folder / "whole", folder / "least", names)
    counted: list[None] = []
    alone, together = swaps.measure(graph, names, rows, folder, lambda: counted.append(None))
    assert len(counted) == len(alone) == len(names)
    assert alone[1] == wanted > 0
    assert together == everything > max(alone)
    assert min(alone) > 0


def test_products_are_those_of_the_stored_weights(made: tuple[search.Subject, Path]) -> None:
    """In f32 the error is that of the weights alone, which numpy computes; in 8 bits that of activations is in it."""
    subject, folder = made
    matrices = matrices_of(subject.separate_plan)
    subject.export(settings(matrices, []), folder / "captured")
    place = folder / "activations"
    place.mkdir()
    given = activations.capture(folder / "captured", [matrix.name for matrix in matrices], rows_of(2, 80), place)
    counted: list[tuple[int, int]] = []
    found = local_errors.measure(subject.model, matrices, given, None, 2, lambda *done: counted.append(done))
    assert counted[-1][0] == counted[-1][1] == sum(int(np.prod(matrix.shape)) for matrix in matrices)
    for matrix in matrices[:4]:
        weights = np.concatenate(_blocks(subject, matrix))
        x = given[matrix.name].astype(np.float64)
        assert len(x) == activations.TOKENS
        for codes in (codes for codes in CANDIDATES if codes.accuracy == F32_ACTIVATIONS):
            coded = edgetune_native.quantize_blocks(
                weights, codes.bits, block_size=codes.block, symmetric=codes.symmetric
            )
            stored = edgetune_native.dequantize_blocks(
                *coded, bits=codes.bits, block_size=codes.block, k=weights.shape[1]
            )
            wanted = float((((stored.astype(np.float64) - weights) @ x.T) ** 2).sum())
            # f32 sums of at most 512 products, each some 1e-2 of the result: 1e-4 of the difference
            assert found[matrix.name].errors[codes] == pytest.approx(wanted, rel=1e-3)
        exact = next(
            codes
            for codes in CANDIDATES
            if codes.accuracy == F32_ACTIVATIONS and codes.block == 128 and codes.symmetric
        )
        rounded = found[matrix.name].errors[next(codes for codes in CANDIDATES if codes.name == exact.name)]
        assert rounded != found[matrix.name].errors[exact]
        assert found[matrix.name].errors[FINEST] < 0.05 * found[matrix.name].errors[COARSEST]
        assert found[matrix.name].swapped == pytest.approx(found[matrix.name].errors[COARSEST], rel=0.2)


def _blocks(subject: search.Subject, matrix: Matrix) -> list[np.ndarray]:
    return [
        make(1).floats.reshape(-1, matrix.shape[-1])
        for source in matrix.sources
        for make in subject.model.in_hf_row_order[source.number].pieces(subject.model.checkpoint)
    ]
