"""A traced graph and its weights: each weight gets a storage type and a place in the file that the graph refers to."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from edgetune_converters.errors import RecipeError
from edgetune_converters.onnx import layout
from edgetune_converters.onnx.builder import CONTRIB
from edgetune_converters.onnx.genai import DecoderSizes
from edgetune_converters.onnx.model import DATA_FILE
from edgetune_converters.onnx.plan import DEFAULT_SETTINGS, OnnxSettings, onnx_recipe
from edgetune_converters.onnx.storage import Floats, NBitsBlocks, Storage
from edgetune_converters.onnx.traced_weights import (
    NodeIndex,
    SlotLookup,
    WeightNodes,
    cast_to_f32,
    choose_storage,
    replacement_nodes,
    rows_name,
)
from edgetune_converters.quantization.recipes import MAX_FALLBACK
from edgetune_converters.tensors import F32

_ELEMENTS = {"f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16}


@dataclass
class TracedModel:
    """A traced graph with its weights by the names of graph inputs. Writing rounds them in place as they are stored."""

    graph: ModelProto
    weights: Mapping[str, F32]
    sizes: DecoderSizes


@dataclass(frozen=True)
class TracedSettings:
    """The storage type, the choices beside it, and the slots of the weights."""

    type: str
    settings: OnnxSettings = DEFAULT_SETTINGS
    slot_of: SlotLookup = lambda name: None
    allow_fallback: bool = False


@dataclass
class WeightSummary:
    """What was written: bytes by storage type, storage type by weight, and the number of weights."""

    types: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    weights: int = 0
    fallback_share: float = 0.0

    def add(self, name: str, storage: Storage, shape: tuple[int, ...]) -> None:
        """Add one weight."""
        size = _bytes(storage, shape)
        self.types[storage.name] = self.types.get(storage.name, 0) + size
        self.tensors[name] = storage.name
        self.weights += math.prod(shape)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, scales and zero points included."""
        return round(sum(self.types.values()) * 8 / self.weights, 4)


def write_weights(path: Path, traced: TracedModel, settings: TracedSettings) -> WeightSummary:
    """Write the file of weights, each array at a page boundary, and make the graph refer to it.

    Raises:
        RecipeError: f16 would overflow, or too much does not fit the type.
    """
    uses = NodeIndex(traced.graph.graph)
    using = {name: uses.of(name) for name in traced.weights}
    chosen, stored = _storages(traced, settings, using), WeightSummary()
    stored.fallback_share = _check_fallback(traced, chosen, allowed=settings.allow_fallback)
    edits = _GraphEdits()
    with path.open("xb") as file:
        for name, weight in traced.weights.items():
            storage, _ = chosen[name]
            _write_weight(file, name, weight, storage, using[name], edits)
            stored.add(name, storage, weight.shape)
        file.flush()
        os.fsync(file.fileno())
    edits.apply(traced)
    return stored


def _storages(
    traced: TracedModel, settings: TracedSettings, using: Mapping[str, WeightNodes]
) -> dict[str, tuple[Storage, Storage]]:
    """Return for each weight its storage, and the storage that the type asks for."""
    recipe = onnx_recipe(settings.type)
    return {
        name: choose_storage(name, weight.shape, using[name].usage, recipe, settings.settings, settings.slot_of(name))
        for name, weight in traced.weights.items()
    }


def _check_fallback(traced: TracedModel, chosen: Mapping[str, tuple[Storage, Storage]], *, allowed: bool) -> float:
    """Return the share of the bytes in another storage than the type asks for."""
    sizes = {name: _bytes(storage, traced.weights[name].shape) for name, (storage, _) in chosen.items()}
    odd = {name: size for name, size in sizes.items() if chosen[name][0] != chosen[name][1]}
    share = sum(odd.values()) / sum(sizes.values())
    if share > MAX_FALLBACK and not allowed:
        largest = max(odd, key=lambda name: odd[name])
        raise RecipeError(
            f"{share:.0%} of the bytes would be stored as f16: the traced graph uses {largest} and {len(odd) - 1} more "
            "in ways, or with rows, that blocks do not fit",
            "Accept that with --allow-fallback, or take f16",
        )
    return share


def _bytes(storage: Storage, shape: tuple[int, ...]) -> int:
    return sum(spec.bytes for spec in storage.specs(shape))


@dataclass
class _GraphEdits:
    """Edits of the graph that are made when all weights are written."""

    nodes: dict[str, NodeProto | None] = field(default_factory=dict)
    """Replacements of nodes by their first output; None removes the node."""
    first: list[NodeProto] = field(default_factory=list)
    """Nodes before all others."""
    renamed: dict[str, str] = field(default_factory=dict)
    """New names of values that nodes read."""
    arrays: list[TensorProto] = field(default_factory=list)
    """New initializers."""

    def apply(self, traced: TracedModel) -> None:
        graph = traced.graph.graph
        kept = [self.nodes.get(node.output[0], node) for node in graph.node]
        nodes = [node for node in kept if node is not None]
        for node in nodes:
            for index, value in enumerate(node.input):
                if value in self.renamed:
                    node.input[index] = self.renamed[value]
        if any(node.domain == CONTRIB for node in nodes):
            traced.graph.opset_import.append(helper.make_opsetid(CONTRIB, 1))
        _replace(graph.node, [*self.first, *nodes])
        _replace(graph.input, [entry for entry in graph.input if entry.name not in traced.weights])
        graph.initializer.extend(self.arrays)


def _write_weight(
    file: BinaryIO, name: str, weight: F32, storage: Storage, use: WeightNodes, edits: _GraphEdits
) -> None:
    """Write a weight, round it in place as it is stored, and collect the edits of the graph."""
    if isinstance(storage, Floats):
        _write_floats(file, name, weight, storage, use, edits)
        return
    assert isinstance(storage, NBitsBlocks)
    rows = np.ascontiguousarray(weight).reshape(-1, weight.shape[-1])
    arrays = storage.store(rows, name, 0)
    specs = storage.specs(weight.shape)
    for spec, array in zip(specs, arrays, strict=True):
        place = _append(file, array)
        edits.arrays.append(_external(name + spec.suffix, spec.dtype, spec.shape, place, spec.bytes))
        if spec.suffix == ".codes" and use.lookups:
            *lead, blocks, blob = spec.shape
            flat = (*lead, blocks * blob)
            edits.arrays.append(_external(rows_name(name), spec.dtype, flat, place, spec.bytes))
    weight[...] = storage.dequantize(arrays, rows.shape).reshape(weight.shape)
    edits.nodes |= {node.output[0]: other for node, other in replacement_nodes(name, weight.shape, use, storage)}


def _write_floats(
    file: BinaryIO, name: str, weight: F32, storage: Floats, use: WeightNodes, edits: _GraphEdits
) -> None:
    """Write floats. A matrix that every use transposes is stored transposed, and the Transpose nodes are removed."""
    transposed = bool(use.products) and not use.lookups and not use.others
    values = np.ascontiguousarray(weight.T if transposed else weight)
    (data,) = storage.store(values.reshape(len(values), -1), name, 0)
    place = _append(file, data)
    edits.arrays.append(_external(name, _ELEMENTS[storage.name], values.shape, place, data.nbytes))
    seen = name
    if storage.name == "f16":
        node = cast_to_f32(name)
        seen = node.output[0]
        edits.first.append(node)
        edits.renamed[name] = seen
        stored = data.reshape(-1).view(np.float16).reshape(values.shape)
        weight[...] = stored.T if transposed else stored
    if transposed:
        edits.nodes |= {node.output[0]: None for node in use.transposes}
        edits.renamed |= {node.output[0]: seen for node in use.transposes}


def _append(file: BinaryIO, data: NDArray[Any]) -> int:
    """Write at the next page boundary and return the offset."""
    file.seek(layout.align_to_page(file.tell()))
    place = file.tell()
    file.write(np.ascontiguousarray(data).data)
    return place


def _external(name: str, dtype: int, shape: Sequence[int], offset: int, length: int) -> TensorProto:
    tensor = TensorProto(name=name, data_type=dtype, dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": DATA_FILE, "offset": offset, "length": length}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _replace(repeated: Any, entries: Sequence[Any]) -> None:
    """Replace the entries of a repeated field of protobuf."""
    kept = list(entries)
    del repeated[:]
    repeated.extend(kept)
