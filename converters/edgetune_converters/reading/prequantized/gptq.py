"""GPTQ: integers of 2 to 8 bits with scale and zero point per group of input columns (AutoGPTQ, GPTQModel, AutoRound).

`qweight` [columns * bits / 32, rows] holds the weight transposed, `qzeros` [groups, rows * bits / 32] the zero points
(minus 1, unless `checkpoint_format` is gptq_v2 or gptq_p), `scales` [groups, rows] floats, and `g_idx` [columns] the
group of each column.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.reading.prequantized.decoder import (
    FLOATS,
    ConfigJson,
    ViewTensor,
    WeightDecoder,
    WeightError,
    check_matrix,
    finite_scales,
    required,
)
from edgetune_converters.reading.prequantized.packed import WORDS, Groups, dequantize, unpack, unpack_planes
from edgetune_converters.tensors import F32, TensorInfo

LABEL = "GPTQ"
_BITS = range(2, 9)
_INDEX_DTYPES = ("I32", "I64")


class GptqWeight:
    """A weight of a GPTQ layer, from its `qweight`."""

    def __init__(self, name: str, tensors: Mapping[str, TensorInfo], config: ConfigJson, view: ViewTensor) -> None:
        module = name.removesuffix(".qweight")
        stated = settings_of(config, module)
        qweight, scales = required(module, ("qweight", "scales"), tensors)
        qzeros, g_idx = tensors.get(f"{module}.qzeros"), tensors.get(f"{module}.g_idx")
        check_matrix(qweight, WORDS)
        rows = qweight.shape[1]
        check_matrix(scales, FLOATS, (None, rows))
        self._bits, columns = _sizes(module, stated, qweight, g_idx, scales)
        self._groups = _groups(module, stated, columns, scales, g_idx, view)
        if qzeros is not None:
            width = qzeros.bytes // max(1, qzeros.shape[0] * qzeros.shape[-1]) * 8
            check_matrix(qzeros, WORDS, (scales.shape[0], -(-rows * self._bits // width)))
        elif stated.get("sym") is not True:
            raise WeightError(f"{module}.qzeros is missing, and config.json does not say that the weight is symmetric")
        self._qweight, self._scales = view(qweight), view(scales)
        self._scales_info = scales
        self._qzeros = None if qzeros is None else view(qzeros)
        stored_as = _checkpoint_format(config)
        self._minus_one = stored_as not in ("gptq_v2", "gptq_p")
        planar = self._bits in (5, 6, 7) or stored_as == "gptq_p"
        self._unpack = unpack_planes if planar else unpack
        found = [info for info in (qweight, scales, qzeros, g_idx) if info is not None]
        self.parts: tuple[str, ...] = tuple(info.name for info in found)
        total = sum(info.bytes for info in found)
        self.info = replace(qweight, name=f"{module}.weight", shape=(rows, columns), dtype=LABEL, bytes=total)

    def rows(self, first: int, last: int) -> F32:
        """Rows first..last in f32, each the exact product."""
        codes = self._unpack(self._qweight[:, first:last].T, self._bits, 0, self._groups.columns)
        scales = finite_scales(self._scales[:, first:last].T, self._scales_info)
        return dequantize(codes, self._zeros(first, last), scales, self._groups)

    def _zeros(self, first: int, last: int) -> F32 | float:
        if self._qzeros is None:
            return float(1 << self._bits - 1)
        words = self._qzeros
        fills_words = 8 % self._bits == 0
        if self._minus_one and fills_words:  # as GPTQModel: one addition per word, carries included
            ones = sum(1 << shift for shift in range(0, words.itemsize * 8, self._bits))
            unsigned = words.view(f"u{words.itemsize}")
            words = unsigned + unsigned.dtype.type(ones)
        zeros = self._unpack(words, self._bits, first, last)
        if self._minus_one and not fills_words:
            zeros = zeros + np.uint8(1) & np.uint8((1 << self._bits) - 1)
        return np.ascontiguousarray(zeros.T).astype(np.float32)


def settings_of(config: ConfigJson, module: str) -> Mapping[str, Any]:
    """Return the settings of a module: those of the model, changed by the first rule whose pattern matches its name.

    GPTQModel's rules are in `dynamic` ("+:" or nothing in front: other settings), AutoRound's in `extra_config`, by
    name or pattern.
    """
    for key in ("dynamic", "extra_config"):
        rules = config.get(key)
        for pattern, rule in rules.items() if isinstance(rules, dict) else ():
            if isinstance(rule, dict) and not pattern.startswith("-:") and _matches(pattern, module):
                return {**config, **rule}
    return config


def _matches(pattern: str, module: str) -> bool:
    pattern = pattern.removeprefix("+:")
    try:
        return pattern == module or re.match(pattern, module) is not None
    except re.error:
        return False


def _checkpoint_format(config: ConfigJson) -> object:
    return config.get("checkpoint_format") or config.get("format") or "gptq"


def _sizes(
    module: str, stated: Mapping[str, Any], qweight: TensorInfo, g_idx: TensorInfo | None, scales: TensorInfo
) -> tuple[int, int]:
    """Bits and columns of a weight: the stated bits, and the columns of g_idx where there is one."""
    packed = qweight.bytes * 8 // qweight.shape[1]  # bits in a column of words
    bits: Any = stated.get("bits")
    if g_idx is not None:
        check_matrix(g_idx, _INDEX_DTYPES, (None,))
        columns = g_idx.shape[0]
        width = packed // qweight.shape[0]
        fitting = [count for count in _BITS if -(-columns * count // width) * width == packed]
        if bits in fitting:
            return bits, columns
        if len(fitting) == 1:  # a rule that gives this module other bits is lost, but the shapes show them
            return fitting[0], columns
    elif type(bits) is int and bits in _BITS:
        size = stated.get("group_size")
        columns = packed // bits
        if type(size) is not int or size <= 0 or scales.shape[0] == -(-columns // size):
            return bits, columns
    raise WeightError(
        f"{qweight.name} {list(qweight.shape)} fits neither the {bits} bits that config.json states nor "
        f"{scales.name} {list(scales.shape)}"
    )


def _groups(
    module: str,
    stated: Mapping[str, Any],
    columns: int,
    scales: TensorInfo,
    g_idx: TensorInfo | None,
    view: ViewTensor,
) -> Groups:
    """The groups of a weight: g_idx where it is not in order, otherwise neighbors."""
    count, size = scales.shape[0], stated.get("group_size")
    if type(size) is not int or size <= 0 or -(-columns // size) != count:
        size = -(-columns // count)
    index = None if g_idx is None else _index(view(g_idx))
    if index is not None and (index.min() < 0 or index.max() >= count):
        raise WeightError(f"{module}.g_idx names group {index.max()} or {index.min()}, of {count} groups")
    in_order = np.arange(columns) // size
    if index is None or np.array_equal(index, in_order):
        if in_order[-1] + 1 != count:
            raise WeightError(f"{scales.name} has {count} groups, which do not fit {columns} columns")
        return Groups(columns, size)
    return Groups(columns, size, index)


def _index(stored: NDArray[Any]) -> NDArray[np.intp]:
    return stored.reshape(-1).astype(np.intp)


class TransposedWeight:
    """A weight that plain checkpoints store transposed, as GPT-2's Conv1D; quantizers store that of a linear layer."""

    def __init__(self, decoder: WeightDecoder) -> None:
        self._decoder = decoder
        self.parts = decoder.parts
        self.info = replace(decoder.info, shape=decoder.info.shape[::-1])

    def rows(self, first: int, last: int) -> F32:
        """Rows first..last, which are columns of the linear layer."""
        whole = self._decoder.rows(0, self.info.shape[-1])
        return np.ascontiguousarray(whole[:, first:last].T)
