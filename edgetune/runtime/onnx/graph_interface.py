"""What a graph wants and gives: the inputs and outputs of a decoder, under the names that genai_config.json states."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgetune.runtime.interface import RuntimeProblem
from edgetune.runtime.onnx.folder import OnnxFolder
from edgetune.runtime.onnx.model_file import GraphFile

# by role: the key in genai_config.json, and the name when it says nothing
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
LOGITS_RANGE = "logits_range"
"""Our own input: (first, end) of the positions of a call whose logits are computed."""

_TYPES = {1: np.float32, 6: np.int32, 7: np.int64, 10: np.float16}  # TensorProto.DataType
_FLOATS, _INTEGERS = (np.float32, np.float16), (np.int32, np.int64)
_MANY = 1 << 16
_OF_THE_LONGEST = frozenset(("If", "ReduceMax"))  # how LongRoPE's tables are switched
_FOREIGN = (
    "edgetune runs decoders with the inputs and outputs of onnxruntime-genai: ids, mask, positions, keys, values."
)


@dataclass(frozen=True)
class ValueInfo:
    """A named input or output. `shape` has None for what is not fixed."""

    name: str
    dtype: type[Any]
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class CacheTensor:
    """One past input and the present output that continues it."""

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
    takes_rows: bool
    """Whether several rows of different lengths can be evaluated at once, each as if it were alone."""


def read_interface(folder: OnnxFolder, model: GraphFile) -> GraphInterface:
    """Errors: RuntimeProblem that names what is missing, unknown or of another type."""
    return _Reading(folder, model).interface()


class _Reading:
    def __init__(self, folder: OnnxFolder, model: GraphFile) -> None:
        self._folder, self._model = folder, model
        graph = model.proto.graph
        initial = {tensor.name for tensor in graph.initializer}
        self._inputs = {port.name: port for port in graph.input if port.name not in initial - {LOGITS_RANGE}}
        self._outputs = {port.name: port for port in graph.output}
        self._names = {
            "inputs": self._patterns("inputs", _INPUTS), "outputs": self._patterns("outputs", _OUTPUTS)
        }  # fmt: skip

    def _patterns(self, section: str, roles: Mapping[str, tuple[str, str]]) -> dict[str, str]:
        stated = self._folder.decoder.get(section)
        stated = stated if isinstance(stated, Mapping) else {}
        found = {role: stated.get(key, usual) for role, (key, usual) in roles.items()}
        return {role: name if isinstance(name, str) else roles[role][1] for role, name in found.items()}

    def interface(self) -> GraphInterface:
        ids = self._input(self._names["inputs"]["ids"], _INTEGERS)
        mask, positions = (self._optional(self._names["inputs"][role]) for role in ("mask", "positions"))
        range_ = self._optional(LOGITS_RANGE)
        logits = self._output(self._names["outputs"]["logits"], _FLOATS)
        caches = self._caches()
        known = [port.name for port in (ids, mask, positions, range_) if port] + [cache.past.name for cache in caches]
        unknown = sorted(self._inputs.keys() - set(known))
        if unknown:
            raise self._problem(f"wants the input {unknown[0]!r}, which is not known here")
        width = logits.shape[-1] if len(logits.shape) == 3 else None
        if width is None:
            raise self._problem(f"gives logits of the shape {list(logits.shape)}, not [batch, sequence, vocabulary]")
        takes_rows = mask is not None and self._takes_rows([ids, mask, logits, *(cache.past for cache in caches)])
        return GraphInterface(ids, mask, positions, range_, logits, caches, self._is_shared(caches), width, takes_rows)

    def _caches(self) -> tuple[CacheTensor, ...]:
        found = []
        for role in ("key", "value"):
            past, present = (self._names[side][role] for side in ("inputs", "outputs"))
            for layer in self._layers(past):
                inward = self._input(_numbered(past, layer), _FLOATS)
                outward = self._output(_numbered(present, layer), (inward.dtype,))
                found.append(self._cache(inward, outward))
        if not found:
            raise self._problem(f"has no input {_numbered(self._names['inputs']['key'], 0)!r}: it keeps no cache")
        if len(found) % 2:
            raise self._problem("has not as many keys as values")
        return tuple(found)

    def _layers(self, pattern: str) -> list[int]:
        before, _, after = pattern.partition("%d")
        expression = re.compile(re.escape(before) + r"(\d{1,4})" + re.escape(after))
        matches = (expression.fullmatch(name) for name in self._inputs)
        return sorted(int(match[1]) for match in matches if match)

    def _cache(self, past: ValueInfo, present: ValueInfo) -> CacheTensor:
        if len(past.shape) != 4:
            raise self._problem(f"wants {past.name} of the shape {list(past.shape)}, not [batch, heads, past, size]")
        stated = self._folder.decoder.get("num_key_value_heads"), self._folder.decoder.get("head_size")
        heads, size = (past.shape[axis] or stated[i] for i, axis in enumerate((1, 3)))
        if not (type(heads) is int and type(size) is int and 0 < heads < _MANY and 0 < size < _MANY):
            raise self._problem(f"does not say how many heads {past.name} has, and of what size")
        return CacheTensor(past, present, heads, size)

    def _is_shared(self, caches: tuple[CacheTensor, ...]) -> bool:
        """GroupQueryAttention of com.microsoft writes the new keys and values behind those of the same buffer."""
        in_place = {
            name
            for node in self._model.nodes
            if (node.domain, node.op_type) == ("com.microsoft", "GroupQueryAttention")
            for name in node.input
        }
        return all(cache.past.name in in_place for cache in caches)

    def _takes_rows(self, ports: Sequence[ValueInfo]) -> bool:
        """Not where the number of rows is fixed, or where the longest row decides about a table of all."""
        if any(not port.shape or port.shape[0] is not None for port in ports):
            return False
        return not any(node.op_type in _OF_THE_LONGEST for node in self._model.nodes)

    def _input(self, name: str, types: tuple[type[Any], ...]) -> ValueInfo:
        if name not in self._inputs:
            raise self._problem(f"has no input {name!r}")
        return self._port(self._inputs[name], types)

    def _optional(self, name: str) -> ValueInfo | None:
        return self._input(name, _INTEGERS) if name in self._inputs else None

    def _output(self, name: str, types: tuple[type[Any], ...]) -> ValueInfo:
        if name not in self._outputs:
            raise self._problem(f"has no output {name!r}")
        return self._port(self._outputs[name], types)

    def _port(self, value: Any, types: tuple[type[Any], ...]) -> ValueInfo:
        tensor = value.type.tensor_type
        dtype = _TYPES.get(tensor.elem_type)
        if dtype not in types:
            raise self._problem(f"has {value.name} in another type than {' or '.join(t.__name__ for t in types)}")
        dims = (dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)
        return ValueInfo(value.name, dtype, tuple(dims))

    def _problem(self, what: str) -> RuntimeProblem:
        return RuntimeProblem(f"{self._model.path} {what}", _FOREIGN)


def _numbered(pattern: str, layer: int) -> str:
    return pattern.replace("%d", str(layer), 1)
