"""A graph that another exporter has drawn, as a directory that ONNX Runtime opens: for families without a description.

The graph comes with its weights as inputs, so that no protobuf ever holds them: here each gets its place in the file
of weights, in its type, and the graph the names and metadata that ours have.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from edgetune_converters.checkpoint import F32, sha256_of
from edgetune_converters.onnx import places
from edgetune_converters.onnx.genai import Sizes, genai_config
from edgetune_converters.onnx.model import DATA_FILE
from edgetune_converters.outputs import folders
from edgetune_converters.outputs.folders import Documents
from edgetune_converters.outputs.onnx import CONFIG_FILE, GRAPH_FILE, check_graph
from edgetune_converters.outputs.storing import store
from edgetune_converters.tokenizers.ends import Ends

TYPES = ("f32", "f16")
_ELEMENTS = {"f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16}
_TURNED = [1, 0]


@dataclass
class Drawn:
    """A graph of which some inputs are the weights, by name."""

    graph: ModelProto
    weights: Mapping[str, F32]
    sizes: Sizes


@dataclass
class Stored:
    """What was written: the bytes of each type, the type of each weight, and how many numbers they are."""

    types: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    weights: int = 0

    @property
    def bits_per_weight(self) -> float:
        """Of all weights."""
        return round(sum(self.types.values()) * 8 / self.weights, 4)


def type_of(weight: NDArray[Any], wanted: str) -> str:
    """Vectors (norms, biases) stay in 32 bits: they are few, and an error in them meets every row."""
    return wanted if weight.ndim > 1 else "f32"


def write(
    folder: Path, drawn: Drawn, wanted: str, documents: Documents, ends: Ends, stated: Mapping[str, str]
) -> Stored:
    """Write graph, weights, tokenizer and genai_config.json into `folder`; `wanted` is one of TYPES.

    `stated` goes into the metadata of the graph. Errors: RecipeError where f16 would overflow; ArtifactError for a
    graph that onnx's checker does not take.
    """
    stored = _write_weights(folder / DATA_FILE, drawn, wanted)
    own = {
        "edgetune.recipe": wanted,
        "edgetune.cache": "grows",
        "edgetune.data.size": str((folder / DATA_FILE).stat().st_size),
        "edgetune.data.sha256": sha256_of(folder / DATA_FILE),
    }
    receipt = {**stated, **own, "bits_per_weight": stored.bits_per_weight, "types": stored.types}
    text = json.dumps(receipt, ensure_ascii=False)
    helper.set_model_props(drawn.graph, {**stated, **own, "edgetune.receipt": text})
    (folder / GRAPH_FILE).write_bytes(drawn.graph.SerializeToString())
    check_graph(folder / GRAPH_FILE, whole=False)
    folders.copy_tokenizer(documents, folder)
    folders.write_json(folder / CONFIG_FILE, genai_config(drawn.sizes, ends))
    return stored


def _write_weights(path: Path, drawn: Drawn, wanted: str) -> Stored:
    """The file of weights, each at a page boundary; the graph is changed so that it finds them there."""
    graph, stored = drawn.graph.graph, Stored()
    casts: list[NodeProto] = []
    with path.open("xb") as file:
        for name, weight in drawn.weights.items():
            kind = type_of(weight, wanted)
            turned = weight.T if _turn(graph, name) else weight
            data = (
                store(np.ascontiguousarray(turned).reshape(len(turned), -1), kind, name, 0).reshape(-1).view(np.uint8)
            )
            file.seek(places.aligned(file.tell()))
            graph.initializer.append(_external(name, kind, turned.shape, file.tell(), data.nbytes))
            file.write(data.data)
            if kind != "f32":
                casts.append(_widened(graph, name))
            stored.types[kind] = stored.types.get(kind, 0) + data.nbytes
            stored.tensors[name] = kind
            stored.weights += math.prod(weight.shape)
        file.flush()
        os.fsync(file.fileno())
    kept = [entry for entry in graph.input if entry.name not in drawn.weights]
    _replace(graph.input, kept)
    _replace(graph.node, [*casts, *graph.node])
    return stored


def _turn(graph: Any, name: str) -> bool:
    """Whether all that is done with a matrix is to transpose it: then it is stored so, and the nodes go."""
    using = [node for node in graph.node if name in node.input]
    if not using or not all(_transposes(node) for node in using):
        return False
    gone = {node.output[0] for node in using}
    _replace(graph.node, [node for node in graph.node if not gone.intersection(node.output)])
    _rename(graph.node, gone, name)
    return True


def _transposes(node: NodeProto) -> bool:
    stated = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    return node.op_type == "Transpose" and list(stated.get("perm", ())) == _TURNED


def _widened(graph: Any, name: str) -> NodeProto:
    """The node that makes f32 of a weight, which all that used the weight use in its place."""
    wide = f"{name}.f32"
    _rename(graph.node, {name}, wide)
    return helper.make_node("Cast", [name], [wide], name=f"{wide}/Cast", to=TensorProto.FLOAT)


def _rename(nodes: Sequence[NodeProto], old: set[str], new: str) -> None:
    for node in nodes:
        for index, value in enumerate(node.input):
            if value in old:
                node.input[index] = new


def _external(name: str, kind: str, shape: tuple[int, ...], offset: int, length: int) -> TensorProto:
    tensor = TensorProto(name=name, data_type=_ELEMENTS[kind], dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": DATA_FILE, "offset": offset, "length": length}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _replace(repeated: Any, entries: Sequence[Any]) -> None:
    """Other entries in a repeated field of protobuf."""
    kept = list(entries)
    del repeated[:]
    repeated.extend(kept)
