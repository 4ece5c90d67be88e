"""Two graphs derived from that of an exported directory, written beside it and using its weights.

One outputs the activations that each matrix is multiplied with. The other has every matrix twice, from this directory
and from another one, and an input that selects one of them: a matrix is swapped without loading a model again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgetune_converters.onnx.model import DATA_FILE
from edgetune_converters.outputs.onnx import GRAPH_FILE

POSITIONS = "positions"
"""Input: the positions [n] whose activations are output, i64."""
SWAPPED = "swapped"
"""Input: for each matrix whether that of the other directory is used, bool."""
_OTHER_DATA = "other.data"


def write_capturing_graph(folder: Path, names: Sequence[str]) -> tuple[Path, Mapping[str, str]]:
    """Write a graph that outputs the activations [1, n, k] of each named matrix at some positions.

    Returns:
        Its path, and the name of the output of each matrix; matrices with the same input share an output.
    """
    model = _graph_of(folder)
    nodes = _products(model)
    inputs = {name: nodes[name].input[0] for name in names}
    outputs = {value: f"activations_{number}" for number, value in enumerate(dict.fromkeys(inputs.values()))}
    for value, output in outputs.items():
        model.graph.node.append(helper.make_node("Gather", [value, POSITIONS], [output], name=output, axis=1))
        model.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
    model.graph.input.append(helper.make_tensor_value_info(POSITIONS, TensorProto.INT64, ["n_positions"]))
    path = _written(model, folder / "capturing.onnx")
    return path, {name: outputs[value] for name, value in inputs.items()}


def write_switching_graph(folder: Path, other: Path, names: Sequence[str]) -> Path:
    """Write a graph with an input SWAPPED [len(names)]. The weights of `other` are moved into `folder`."""
    model, second = _graph_of(folder), _graph_of(other)
    ours, theirs = _products(model), _products(second)
    (other / DATA_FILE).rename(folder / _OTHER_DATA)
    weights = {tensor.name: tensor for tensor in second.graph.initializer}
    graph = model.graph
    nodes = {id(ours[name]): (number, theirs[name]) for number, name in enumerate(names)}
    made: list[NodeProto] = []
    for node in graph.node:
        number, swapped = nodes.get(id(node), (0, None))
        made += [node] if swapped is None else _switch(number, node, swapped, weights)
    _replace(graph.node, made)
    numbers = [numpy_helper.from_array(np.array(number, np.int64), _number(number)) for number in range(len(names))]
    graph.initializer.extend([numpy_helper.from_array(np.zeros(len(names), bool), SWAPPED), *numbers])
    graph.input.append(helper.make_tensor_value_info(SWAPPED, TensorProto.BOOL, [len(names)]))
    return _written(model, folder / "switching.onnx")


def _graph_of(folder: Path) -> ModelProto:
    return onnx.load_model(folder / GRAPH_FILE, load_external_data=False)


def _written(model: ModelProto, path: Path) -> Path:
    del model.metadata_props[:]  # they describe the original graph
    path.write_bytes(model.SerializeToString())
    return path


def _products(model: ModelProto) -> dict[str, NodeProto]:
    """Return the node of each matrix, by the name of its weight."""
    nodes = (node for node in model.graph.node if node.op_type == "MatMulNBits")
    return {node.input[1].removesuffix(".codes"): node for node in nodes}


def _switch(number: int, node: NodeProto, other: NodeProto, weights: Mapping[str, TensorProto]) -> list[NodeProto]:
    """Return an If with the two nodes as branches; the weights of the other node are in its branch."""
    condition = f"{node.name}/swapped"
    output = node.output[0]
    names = [name for name in other.input[1:] if name in weights and name.endswith(_CODES)]
    moved = [_renamed_weight(weights[name], number) for name in names]
    renamed = {tensor.name.removeprefix(f"other {number} "): tensor.name for tensor in moved}
    inputs = [node.input[0], *(renamed.get(name, name) for name in other.input[1:])]
    branches = {"then_branch": _branch(other, inputs, moved), "else_branch": _branch(node, node.input, [])}
    return [
        helper.make_node("Gather", [SWAPPED, _number(number)], [condition], name=condition),
        helper.make_node("If", [condition], [output], name=f"{node.name}/If", **branches),
    ]


_CODES = (".codes", ".scales", ".zero_points")


def _branch(node: NodeProto, inputs: Sequence[str], weights: Sequence[TensorProto]) -> Any:
    inner = copy.deepcopy(node)
    _replace(inner.input, inputs)
    _replace(inner.output, [f"{node.name}/chosen"])
    value = helper.make_tensor_value_info(inner.output[0], TensorProto.FLOAT, None)
    return helper.make_graph([inner], f"{node.name}/branch", [], [value], weights)


def _renamed_weight(tensor: TensorProto, number: int) -> TensorProto:
    """Return the tensor with its data in the file to which they were moved."""
    moved = copy.deepcopy(tensor)
    moved.name = f"other {number} {tensor.name}"
    for entry in moved.external_data:
        entry.value = _OTHER_DATA if entry.key == "location" else entry.value
    return moved


def _number(number: int) -> str:
    return f"matrix {number}"


def _replace(repeated: Any, entries: Sequence[Any]) -> None:
    kept = list(entries)
    del repeated[:]
    repeated.extend(kept)
