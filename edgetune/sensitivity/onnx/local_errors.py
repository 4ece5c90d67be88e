"""The error of the product of a matrix in each storage, computed by the real operator.

The merged weights are read in blocks of rows, as for an export. Each block is stored in every candidate storage, and
all are multiplied with the captured activations in one small session of ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from edgetune.console import Progress
from edgetune.reference.codecs import F32
from edgetune.runtime.onnx.session import library, session_options
from edgetune.sensitivity.onnx.candidates import CANDIDATES, COARSEST, FINEST, STORAGES, Matrix
from edgetune_converters.files.ordered_pool import run_in_order, split_threads
from edgetune_converters.merging.stream import MergedTensor, RowBlock
from edgetune_converters.model import Model
from edgetune_converters.onnx.builder import CONTRIB, IR_VERSION, OPSET
from edgetune_converters.onnx.storage import NBitsBlocks
from edgetune_converters.quantization.imatrix import ImportanceMatrix

_EXACT = "exact"


@dataclass
class LocalErrors:
    """Squared errors of the product of one matrix, summed over all captured tokens and all rows."""

    errors: dict[NBitsBlocks, float] = field(default_factory=lambda: dict.fromkeys(CANDIDATES, 0.0))
    """Between the product in each storage and that of the unquantized weights."""
    swapped: float = 0.0
    """Between COARSEST and FINEST, the two that the pass over held-out rows swaps."""


class _BlockErrors(NamedTuple):
    matrix: Matrix
    block: RowBlock
    errors: Mapping[NBitsBlocks, float]
    swapped: float


def measure(
    model: Model,
    matrices: Sequence[Matrix],
    activations: Mapping[str, F32],
    importance: ImportanceMatrix | None,
    threads: int,
    progress: Progress,
) -> dict[str, LocalErrors]:
    """Return the errors by the names of the matrices; `progress` counts weights."""
    found = {matrix.name: LocalErrors() for matrix in matrices}
    total = sum(int(np.prod(matrix.shape)) for matrix in matrices)
    workers, _ = split_threads(threads)
    done = 0
    for matrix, block, errors, swapped in run_in_order(_calls(model, matrices, activations, importance), workers):
        of = found[matrix.name]
        for codes, error in errors.items():
            of.errors[codes] += error
        of.swapped += swapped
        done += block.rows.size
        block.release()
        progress(done, total)
    return found


def _calls(
    model: Model, matrices: Sequence[Matrix], activations: Mapping[str, F32], importance: ImportanceMatrix | None
) -> Iterator[Callable[[], _BlockErrors]]:
    for matrix in matrices:
        given = np.ascontiguousarray(activations[matrix.name])
        for source in matrix.sources:
            tensor = model.in_hf_row_order[source.number]
            for make in tensor.pieces(model.checkpoint):
                yield partial(_measure_block, matrix, tensor, make, given, importance)


def _measure_block(
    matrix: Matrix,
    tensor: MergedTensor,
    make: Callable[[int], RowBlock],
    given: F32,
    importance: ImportanceMatrix | None,
) -> _BlockErrors:
    block = make(1)
    rows = block.rows.reshape(-1, matrix.shape[-1])
    weights = None
    if importance is not None:
        ((_, weights),) = importance.pieces(tensor.gguf_name, tensor.shape, block.first, rows)
    stored = {codes: codes.store(rows, matrix.name, 1, weights) for codes in STORAGES}
    products = _products(block.floats.reshape(rows.shape), stored, given)
    exact = products.pop(_EXACT)
    errors = {codes: _squares(products[_name(codes)] - exact) for codes in CANDIDATES}
    return _BlockErrors(matrix, block, errors, _squares(products[_name(COARSEST)] - products[_name(FINEST)]))


def _squares(difference: F32) -> float:
    flat = difference.ravel()
    return float(np.dot(flat, flat))


def _name(codes: NBitsBlocks) -> str:
    return f"{codes.name} {codes.accuracy}"


def _products(rows: F32, stored: Mapping[NBitsBlocks, Sequence[NDArray[np.uint8]]], given: F32) -> dict[str, F32]:
    """Return given [n, k] times rows.T, with the weights as they are and in every candidate."""
    count, width = rows.shape
    weights = [
        TensorProto(name=_EXACT + " rows", data_type=TensorProto.FLOAT, dims=rows.shape, raw_data=rows.tobytes())
    ]
    nodes = [helper.make_node("FusedMatMul", ["x", weights[0].name], [_EXACT], domain=CONTRIB, transB=1)]
    names: dict[str, list[str]] = {}
    for codes, arrays in stored.items():
        specs = codes.specs(rows.shape)
        names[codes.name] = [codes.name + spec.suffix for spec in specs]
        weights += [
            TensorProto(name=codes.name + spec.suffix, data_type=spec.dtype, dims=spec.shape, raw_data=array.tobytes())
            for spec, array in zip(specs, arrays, strict=True)
        ]
    nodes += [_product(codes, names[codes.name], count, width) for codes in CANDIDATES]
    outputs = [node.output[0] for node in nodes]
    session = library().InferenceSession(_serialized(nodes, weights, width, count), _options(), providers=_PROVIDERS)
    return dict(zip(outputs, session.run(outputs, {"x": given}), strict=True))


def _product(codes: NBitsBlocks, inputs: Sequence[str], count: int, width: int) -> NodeProto:
    sizes = {"K": width, "N": count, "bits": codes.bits, "block_size": codes.block, "accuracy_level": codes.accuracy}
    return helper.make_node("MatMulNBits", ["x", *inputs], [_name(codes)], domain=CONTRIB, **sizes)


_PROVIDERS = ("CPUExecutionProvider",)


def _options() -> Any:
    chosen = session_options(1)
    chosen.graph_optimization_level = library().GraphOptimizationLevel.ORT_DISABLE_ALL
    return chosen


def _serialized(nodes: Sequence[NodeProto], weights: Sequence[TensorProto], width: int, count: int) -> bytes:
    graph = helper.make_graph(
        list(nodes),
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", width])],
        [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, ["n", count]) for node in nodes],
        list(weights),
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION).SerializeToString())
