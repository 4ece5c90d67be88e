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
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from edgetune_converters.errors import RecipeError
from edgetune_converters.files.companions import CompanionFiles, copy_tokenizer, write_json
from edgetune_converters.files.contents import sha256_of
from edgetune_converters.gguf import keys
from edgetune_converters.onnx import layout
from edgetune_converters.onnx.builder import CONTRIB
from edgetune_converters.onnx.genai import DecoderSizes, genai_config
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
from edgetune_converters.outputs.onnx import CONFIG_FILE, GRAPH_FILE, check_graph
from edgetune_converters.quantization.recipes import MAX_FALLBACK
from edgetune_converters.tensors import F32
from edgetune_converters.tokenizers.special import SpecialTokenIds

CODES = ("int8", "int4")
TYPES = ("f32", "f16", *CODES)
_ELEMENTS = {"f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16}


@dataclass
class TracedModel:
    """A graph of which some inputs are the weights, by name: writing rounds them to what is stored, in place."""

    graph: ModelProto
    weights: Mapping[str, F32]
    sizes: DecoderSizes


@dataclass(frozen=True)
class TracedSettings:
    """The type, what is chosen beside it, and how the family's table calls a weight."""

    type: str
    settings: OnnxSettings = DEFAULT_SETTINGS
    slot_of: SlotLookup = lambda name: None
    allow_fallback: bool = False


@dataclass
class WeightSummary:
    """What was written: the bytes of each type, the type of each weight, and how many numbers they are."""

    types: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    weights: int = 0
    fallback_share: float = 0.0

    def add(self, name: str, storage: Storage, shape: tuple[int, ...]) -> None:
        """One more weight."""
        size = _bytes(storage, shape)
        self.types[storage.name] = self.types.get(storage.name, 0) + size
        self.tensors[name] = storage.name
        self.weights += math.prod(shape)

    @property
    def bits_per_weight(self) -> float:
        """Of all weights."""
        return round(sum(self.types.values()) * 8 / self.weights, 4)


def write(
    folder: Path,
    drawn: TracedModel,
    wanted: TracedSettings,
    documents: CompanionFiles,
    ends: SpecialTokenIds,
    stated: Mapping[str, str],
) -> WeightSummary:
    """Write graph, weights, tokenizer and genai_config.json into `folder`; the type is one of TYPES.

    `stated` goes into the metadata of the graph. Errors: RecipeError where f16 would overflow, or too much does not fit
    the type; ArtifactError for a graph that onnx's checker does not take.
    """
    stored = _write_weights(folder / DATA_FILE, drawn, wanted)
    own = {
        keys.RECIPE: wanted.type,
        keys.CACHE: "grows",
        keys.DATA_SIZE: str((folder / DATA_FILE).stat().st_size),
        keys.DATA_HASH: sha256_of(folder / DATA_FILE),
    }
    receipt = {**stated, **own, "bits_per_weight": stored.bits_per_weight, "types": stored.types}
    text = json.dumps(receipt, ensure_ascii=False)
    helper.set_model_props(drawn.graph, {**stated, **own, keys.RECEIPT: text})
    (folder / GRAPH_FILE).write_bytes(drawn.graph.SerializeToString())
    check_graph(folder / GRAPH_FILE, infer_shapes=False)
    copy_tokenizer(documents, folder)
    write_json(folder / CONFIG_FILE, genai_config(drawn.sizes, ends))
    return stored


def _write_weights(path: Path, drawn: TracedModel, wanted: TracedSettings) -> WeightSummary:
    """The file of weights, each array at a page boundary; the graph is changed so that it finds them there."""
    uses = NodeIndex(drawn.graph.graph)
    using = {name: uses.of(name) for name in drawn.weights}
    chosen, stored = _chosen(drawn, wanted, using), WeightSummary()
    stored.fallback_share = _checked_share(drawn, chosen, allowed=wanted.allow_fallback)
    changes = _Changes()
    with path.open("xb") as file:
        for name, weight in drawn.weights.items():
            storage, _ = chosen[name]
            _write_weight(file, name, weight, storage, using[name], changes)
            stored.add(name, storage, weight.shape)
        file.flush()
        os.fsync(file.fileno())
    changes.apply(drawn)
    return stored


def _chosen(
    drawn: TracedModel, wanted: TracedSettings, using: Mapping[str, WeightNodes]
) -> dict[str, tuple[Storage, Storage]]:
    """What each weight gets, and what it was meant to get."""
    types = onnx_recipe(wanted.type)
    return {
        name: choose_storage(name, weight.shape, using[name].usage, types, wanted.settings, wanted.slot_of(name))
        for name, weight in drawn.weights.items()
    }


def _checked_share(drawn: TracedModel, chosen: Mapping[str, tuple[Storage, Storage]], *, allowed: bool) -> float:
    """The share of the bytes that could not have the type they were meant to have. Errors: RecipeError past a limit."""
    sizes = {name: _bytes(storage, drawn.weights[name].shape) for name, (storage, _) in chosen.items()}
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
class _Changes:
    """What becomes of the graph: nodes that go or are replaced (by their first output), others before all, arrays."""

    nodes: dict[str, NodeProto | None] = field(default_factory=dict)
    first: list[NodeProto] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    arrays: list[TensorProto] = field(default_factory=list)

    def apply(self, drawn: TracedModel) -> None:
        """Change it."""
        graph = drawn.graph.graph
        kept = [self.nodes.get(node.output[0], node) for node in graph.node]
        nodes = [node for node in kept if node is not None]
        for node in nodes:
            for index, value in enumerate(node.input):
                if value in self.renamed:
                    node.input[index] = self.renamed[value]
        if any(node.domain == CONTRIB for node in nodes):
            drawn.graph.opset_import.append(helper.make_opsetid(CONTRIB, 1))
        _replace(graph.node, [*self.first, *nodes])
        _replace(graph.input, [entry for entry in graph.input if entry.name not in drawn.weights])
        graph.initializer.extend(self.arrays)


def _write_weight(
    file: BinaryIO, name: str, weight: F32, storage: Storage, use: WeightNodes, changes: _Changes
) -> None:
    """Store a weight, round it to what was stored, and say what that means for the graph."""
    if isinstance(storage, Floats):
        _write_floats(file, name, weight, storage, use, changes)
        return
    assert isinstance(storage, NBitsBlocks)
    rows = np.ascontiguousarray(weight).reshape(-1, weight.shape[-1])
    arrays = storage.store(rows, name, 0)
    specs = storage.specs(weight.shape)
    for spec, array in zip(specs, arrays, strict=True):
        place = _append(file, array)
        changes.arrays.append(_external(name + spec.suffix, spec.dtype, spec.shape, place, spec.bytes))
        if spec.suffix == ".codes" and use.lookups:
            *lead, blocks, blob = spec.shape
            flat = (*lead, blocks * blob)
            changes.arrays.append(_external(rows_name(name), spec.dtype, flat, place, spec.bytes))
    weight[...] = storage.dequantize(arrays, rows.shape).reshape(weight.shape)
    changes.nodes |= {node.output[0]: other for node, other in replacement_nodes(name, weight.shape, use, storage)}


def _write_floats(file: BinaryIO, name: str, weight: F32, storage: Floats, use: WeightNodes, changes: _Changes) -> None:
    """As numbers. A matrix that is only ever transposed for products is stored so, and the nodes go."""
    turned = bool(use.products) and not use.lookups and not use.others
    values = np.ascontiguousarray(weight.T if turned else weight)
    (data,) = storage.store(values.reshape(len(values), -1), name, 0)
    place = _append(file, data)
    changes.arrays.append(_external(name, _ELEMENTS[storage.name], values.shape, place, data.nbytes))
    seen = name
    if storage.name == "f16":
        node = cast_to_f32(name)
        seen = node.output[0]
        changes.first.append(node)
        changes.renamed[name] = seen
        stored = data.reshape(-1).view(np.float16).reshape(values.shape)
        weight[...] = stored.T if turned else stored
    if turned:
        changes.nodes |= {node.output[0]: None for node in use.turning}
        changes.renamed |= {node.output[0]: seen for node in use.turning}


def _append(file: BinaryIO, data: NDArray[Any]) -> int:
    """Write at the next page; returns where."""
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
    """Other entries in a repeated field of protobuf."""
    kept = list(entries)
    del repeated[:]
    repeated.extend(kept)
