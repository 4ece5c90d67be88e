"""A merged model as an ONNX graph: its plan, the layout of its weights, and the graph that refers to them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from onnx import ModelProto, TensorProto

from edgetune_converters.architectures import FAMILIES, Family, ModelConfig
from edgetune_converters.architectures.decoder import DecoderSpec, describe
from edgetune_converters.errors import ArchitectureError
from edgetune_converters.merging.stream import MergedTensor
from edgetune_converters.onnx import layout
from edgetune_converters.onnx.assembly import assemble
from edgetune_converters.onnx.builder import Graph
from edgetune_converters.onnx.layout import ExternalArray, SourceTensor, WeightLayout, WeightPart
from edgetune_converters.onnx.operators import Operators
from edgetune_converters.onnx.plan import TABLE, OnnxPlan, OnnxRecipe, OnnxSettings, plan
from edgetune_converters.onnx.standard import operators_for
from edgetune_converters.onnx.storage import ArraySpec
from edgetune_converters.quantization.recipes import PlannedTensor
from edgetune_converters.tensors import F32

DATA_FILE = "model.onnx.data"
SCORE_WEIGHT = "score.weight"
_TABLE_BYTES = 4 * 1024 * 1024


def source_tensors(tensors: Sequence[MergedTensor]) -> list[SourceTensor]:
    """Return the tensors of a merged model that a graph uses; those made for GGUF alone are left out."""
    return [
        SourceTensor(index, (tensor.slot, tensor.layer, tensor.part), _shape(tensor), tensor.dtype)
        for index, tensor in enumerate(tensors)
        if layout.has_place(tensor.slot)
    ]


def _shape(tensor: MergedTensor) -> tuple[int, ...]:
    """Return the shape in a graph. llama.cpp stores the one-row matrix of the shared router as a vector."""
    return (1, *tensor.shape) if tensor.slot == "shared_router" else tensor.shape


def describe_model(family: Family, config: ModelConfig, sources: Sequence[SourceTensor]) -> DecoderSpec:
    """The description of a model. Errors: ArchitectureError for a family that has none."""
    if family.onnx is None:
        described = ", ".join(other.name for other in FAMILIES if other.onnx)
        raise ArchitectureError(
            f"{family.name} cannot be written as ONNX without torch",
            f"Families that can: {described}; `edgetune merge-export -q f32` takes torch for others",
        )
    return describe(family.onnx, config, {source.slot: source.shape for source in sources})


@dataclass(frozen=True)
class DecoderGraph:
    """A decoder in one storage type: the plan, the layout of the file of weights, and the graph."""

    decoder: DecoderSpec
    plan: OnnxPlan
    placed: tuple[WeightLayout, ...]
    tables: dict[str, tuple[ExternalArray, ExternalArray]]
    settings: OnnxSettings
    score_head: F32 | None = None
    """[hidden size] of a reward model."""

    @classmethod
    def of(
        cls,
        decoder: DecoderSpec,
        sources: Sequence[SourceTensor],
        types: OnnxRecipe,
        settings: OnnxSettings,
        score_head: F32 | None = None,
    ) -> DecoderGraph:
        """Choose the storage of each weight and lay out the file: weights, rotary tables, then the score head."""
        rows = [*_table_rows(decoder), *([] if score_head is None else [_score_row(score_head)])]
        chosen = plan(types, sources, rows, settings)
        placed = tuple(layout.lay_out(chosen.chosen))
        return cls(decoder, chosen, placed, _tables(decoder, _end(placed)), settings, score_head)

    @property
    def size(self) -> int:
        """Bytes of the file of weights."""
        return max(array.offset + array.spec.bytes for array in self.arrays)

    @property
    def arrays(self) -> list[ExternalArray]:
        """All arrays of the file of weights in file order."""
        head = self._score_array
        return self._arrays_of_decoder + ([] if head is None else [head])

    @property
    def _arrays_of_decoder(self) -> list[ExternalArray]:
        weights = [array for item in self.placed for array in item.arrays]
        return weights + [array for pair in self.tables.values() for array in pair]

    @property
    def _score_array(self) -> ExternalArray | None:
        """The score head behind all others, f32 [hidden size, 1]."""
        if self.score_head is None:
            return None
        end = max(array.offset + array.spec.bytes for array in self._arrays_of_decoder)
        spec = ArraySpec("", TensorProto.FLOAT, (len(self.score_head), 1), self.score_head.nbytes)
        return ExternalArray(SCORE_WEIGHT, spec, layout.align_to_page(end))

    def table_rows(self) -> Iterator[tuple[ExternalArray, int, F32]]:
        """Yield the rotary tables and the score head a few rows at a time: array, first row, values."""
        for name, arrays in self.tables.items():
            rotation = self.decoder.rotations[name]
            rows, width = arrays[0].spec.shape
            step = max(1, _TABLE_BYTES // (4 * width))
            for first in range(0, rows, step):
                for array, values in zip(arrays, rotation.tables(first, min(first + step, rows)), strict=True):
                    yield array, first, values
        if self.score_head is not None and self._score_array is not None:
            yield self._score_array, 0, self.score_head[:, None]

    def proto(self, producer_version: str) -> ModelProto:
        """Build the graph, without the weights."""
        graph = Graph(DATA_FILE)
        weights = {item.weight.name: item for item in self.placed}
        assemble(self._operators(graph, self.decoder, weights, self.tables), self._score_array)
        return graph.model(producer_version)

    @property
    def in_place(self) -> bool:
        """Whether past and present of the cache may share one buffer as long as the context."""
        return self._operators.in_place

    @property
    def _operators(self) -> type[Operators]:
        return operators_for(self.decoder, portable=self.settings.portable)


def _end(placed: Sequence[WeightLayout]) -> int:
    return max(array.offset + array.spec.bytes for item in placed for array in item.arrays)


def _score_row(head: F32) -> PlannedTensor:
    why = "the score head stays in f32"
    return PlannedTensor(SCORE_WEIGHT, (len(head), 1), "run", "f32", "f32", why, head.nbytes)


def _table_shape(decoder: DecoderSpec, name: str) -> tuple[int, int]:
    rotation = decoder.rotations[name]
    return rotation.rows(decoder.context), rotation.dim // 2


def _table_rows(decoder: DecoderSpec) -> list[PlannedTensor]:
    rows = []
    for name in decoder.rotations:
        shape = _table_shape(decoder, name)
        size = 4 * math.prod(shape)
        why = "rotary embedding, computed from config.json"
        rows += [PlannedTensor(f"{which}.{name}", shape, "-", TABLE, TABLE, why, size) for which in ("cos", "sin")]
    return rows


def _tables(decoder: DecoderSpec, start: int) -> dict[str, tuple[ExternalArray, ExternalArray]]:
    found, offset = {}, start
    for name in decoder.rotations:
        shape = _table_shape(decoder, name)
        spec = ArraySpec("", TensorProto.FLOAT, shape, 4 * math.prod(shape))
        pair = []
        for which in ("cos", "sin"):
            offset = layout.align_to_page(offset)
            pair.append(ExternalArray(f"{which}.{name}", spec, offset))
            offset += spec.bytes
        found[name] = (pair[0], pair[1])
    return found


def uses_by_source(placed: Sequence[WeightLayout]) -> dict[int, list[tuple[WeightLayout, WeightPart]]]:
    """Return for each tensor of the pass, by its index, the weights that it is a part of."""
    found: dict[int, list[tuple[WeightLayout, WeightPart]]] = {}
    for item in placed:
        for part in item.weight.parts:
            found.setdefault(part.source.number, []).append((item, part))
    return found
