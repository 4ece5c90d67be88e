"""The inputs and outputs of a decoder graph by role, under the names that genai_config.json gives them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgetune.errors import RuntimeProblem
from edgetune.runtime.onnx.folder import OnnxFolder
from edgetune.runtime.onnx.model_file import GraphFile

# role -> (key in genai_config.json, default name)
_INPUTS = {
    "ids": ("input_ids", "input_ids"),
    "mask": ("attention_mask", "attention_mask"),
    "positions": ("position_ids", "position_ids"),
    "key": ("past_key_names", "past_key_values.%d.key"),
    "value": ("past_value_names", "past_key_values.%d.value"),
}
_OUTPUTS = {
    "logits": ("logits", "logits"),
    "key": ("present_key_names", "present.%d.key"),
    "value": ("present_value_names", "present.%d.value"),
}
SCORE = "score"
"""Output of edgetune's own graphs of reward models: the score at the last token of each row, [batch, 1]."""
LOGITS_RANGE = "logits_range"
"""Input of edgetune's own graphs: (first, end) of the tokens of a call whose logits are computed."""

_TYPES = {1: np.float32, 6: np.int32, 7: np.int64, 10: np.float16}  # TensorProto.DataType
_FLOATS, _INTEGERS = (np.float32, np.float16), (np.int32, np.int64)
_SIZE_LIMIT = 1 << 16
_BATCH_DEPENDENT = frozenset(("If", "ReduceMax"))  # LongRoPE selects its tables by the longest row of a batch
_HINT = "edgetune runs decoders with the inputs and outputs of onnxruntime-genai: ids, mask, positions, keys, values"


@dataclass(frozen=True)
class ValueInfo:
    """A named input or output of a graph. `shape` has None for a dimension that is not fixed."""

    name: str
    dtype: type[Any]
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class CacheTensor:
    """The keys or values of one layer: the `past` input and the `present` output that continues it."""

    past: ValueInfo
    present: ValueInfo
    heads: int
    head_size: int


@dataclass(frozen=True)
class GraphInterface:
    """All inputs and outputs of a decoder, by role."""

    ids: ValueInfo
    mask: ValueInfo | None
    positions: ValueInfo | None
    range: ValueInfo | None
    logits: ValueInfo
    caches: tuple[CacheTensor, ...]
    is_shared: bool
    """Whether the attention appends to the past in place, so that past and present are one buffer."""
    vocabulary_size: int
    score: ValueInfo | None
    """Of a reward model."""
    takes_batch: bool
    """Whether several sequences of different lengths can be evaluated in one pass without affecting each other."""


def read_interface(folder: OnnxFolder, model: GraphFile) -> GraphInterface:
    """Read the interface of a graph. Raises RuntimeProblem for a missing, unknown or ill-typed input or output."""
    return _InterfaceReader(folder, model).read()


class _InterfaceReader:
    def __init__(self, folder: OnnxFolder, model: GraphFile) -> None:
        self._folder, self._model = folder, model
        graph = model.proto.graph
        initial = {tensor.name for tensor in graph.initializer}
        self._inputs = {value.name: value for value in graph.input if value.name not in initial - {LOGITS_RANGE}}
        self._outputs = {value.name: value for value in graph.output}
        self._names = {
            "inputs": self._patterns("inputs", _INPUTS), "outputs": self._patterns("outputs", _OUTPUTS)
        }  # fmt: skip

    def _patterns(self, section: str, roles: Mapping[str, tuple[str, str]]) -> dict[str, str]:
        stated = self._folder.decoder.get(section)
        stated = stated if isinstance(stated, Mapping) else {}
        found = {role: stated.get(key, usual) for role, (key, usual) in roles.items()}
        return {role: name if isinstance(name, str) else roles[role][1] for role, name in found.items()}

    def read(self) -> GraphInterface:
        ids = self._input(self._names["inputs"]["ids"], _INTEGERS)
        mask, positions = (self._optional(self._names["inputs"][role]) for role in ("mask", "positions"))
        range_ = self._optional(LOGITS_RANGE)
        logits = self._output(self._names["outputs"]["logits"], _FLOATS)
        caches = self._caches()
        known = {value.name for value in (ids, mask, positions, range_, *(cache.past for cache in caches)) if value}
        unknown = sorted(self._inputs.keys() - known)
        if unknown:
            raise self._problem(f"has the unknown input {unknown[0]!r}")
        width = logits.shape[-1] if len(logits.shape) == 3 else None
        if width is None:
            raise self._problem(f"has logits of the shape {list(logits.shape)}, not [batch, sequence, vocabulary]")
        takes_batch = mask is not None and self._takes_batch([ids, mask, logits, *(cache.past for cache in caches)])
        score = self._output(SCORE, (np.float32,)) if SCORE in self._outputs else None
        is_shared = self._is_shared(caches)
        return GraphInterface(ids, mask, positions, range_, logits, caches, is_shared, width, score, takes_batch)

    def _caches(self) -> tuple[CacheTensor, ...]:
        found = []
        for role in ("key", "value"):
            past, present = (self._names[side][role] for side in ("inputs", "outputs"))
            for layer in self._layers(past):
                inward = self._input(_fill_in(past, layer), _FLOATS)
                outward = self._output(_fill_in(present, layer), (inward.dtype,))
                found.append(self._cache(inward, outward))
        if not found:
            raise self._problem(f"has no input {_fill_in(self._names['inputs']['key'], 0)!r}: it has no cache")
        if len(found) % 2:
            raise self._problem("has different numbers of keys and values")
        return tuple(found)

    def _layers(self, pattern: str) -> list[int]:
        before, _, after = pattern.partition("%d")
        expression = re.compile(re.escape(before) + r"(\d{1,4})" + re.escape(after))
        matches = (expression.fullmatch(name) for name in self._inputs)
        return sorted(int(match[1]) for match in matches if match)

    def _cache(self, past: ValueInfo, present: ValueInfo) -> CacheTensor:
        if len(past.shape) != 4:
            raise self._problem(f"has {past.name} of the shape {list(past.shape)}, not [batch, heads, past, size]")
        stated = self._folder.decoder.get("num_key_value_heads"), self._folder.decoder.get("head_size")
        heads, size = (past.shape[axis] or stated[i] for i, axis in enumerate((1, 3)))
        if not (type(heads) is int and type(size) is int and 0 < heads < _SIZE_LIMIT and 0 < size < _SIZE_LIMIT):
            raise self._problem(f"does not give the number of heads of {past.name} and their size")
        return CacheTensor(past, present, heads, size)

    def _is_shared(self, caches: tuple[CacheTensor, ...]) -> bool:
        """Whether all caches belong to com.microsoft.GroupQueryAttention, which appends to the past in place."""
        in_place = {
            name
            for node in self._model.nodes
            if (node.domain, node.op_type) == ("com.microsoft", "GroupQueryAttention")
            for name in node.input
        }
        return all(cache.past.name in in_place for cache in caches)

    def _takes_batch(self, values: Sequence[ValueInfo]) -> bool:
        """Whether the batch dimension is free and no operator makes a row depend on the longest one."""
        if any(not value.shape or value.shape[0] is not None for value in values):
            return False
        return not any(node.op_type in _BATCH_DEPENDENT for node in self._model.nodes)

    def _input(self, name: str, types: tuple[type[Any], ...]) -> ValueInfo:
        if name not in self._inputs:
            raise self._problem(f"has no input {name!r}")
        return self._value_info(self._inputs[name], types)

    def _optional(self, name: str) -> ValueInfo | None:
        return self._input(name, _INTEGERS) if name in self._inputs else None

    def _output(self, name: str, types: tuple[type[Any], ...]) -> ValueInfo:
        if name not in self._outputs:
            raise self._problem(f"has no output {name!r}")
        return self._value_info(self._outputs[name], types)

    def _value_info(self, value: Any, types: tuple[type[Any], ...]) -> ValueInfo:
        tensor = value.type.tensor_type
        dtype = _TYPES.get(tensor.elem_type)
        if dtype not in types:
            raise self._problem(f"has {value.name} in another type than {' or '.join(t.__name__ for t in types)}")
        dims = (dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)
        return ValueInfo(value.name, dtype, tuple(dims))

    def _problem(self, what: str) -> RuntimeProblem:
        return RuntimeProblem(f"{self._model.path} {what}", _HINT)


def _fill_in(pattern: str, layer: int) -> str:
    return pattern.replace("%d", str(layer), 1)
