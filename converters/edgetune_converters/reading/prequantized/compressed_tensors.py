"""Weights of compressed-tensors (llm-compressor) that are packed into words: `weight_packed` and what belongs to it.

pack-quantized: integers of 1 to 8 bits without gaps, offset by half their range, with a scale per tensor, row or group,
and zero points that are packed along the rows. Weights that are stored unpacked are those of scaled.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

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
from edgetune_converters.reading.prequantized.float4 import PackedFloat4
from edgetune_converters.reading.prequantized.packed import Codes, Groups, Words, dequantize, unpack, unpack_whole
from edgetune_converters.tensors import F32, TensorInfo

LABEL = "INT-PACKED"
_UNUSED = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")
_Unpack = Callable[[Words, int, int, int], Codes]


def packed_weight(name: str, tensors: Mapping[str, TensorInfo], config: ConfigJson, view: ViewTensor) -> WeightDecoder:
    """Return the decoder of a `weight_packed`: bytes hold 4-bit floats, words hold integers."""
    module = name.removesuffix(".weight_packed")
    if tensors[name].dtype == "U8":
        return PackedFloat4(module, name, tensors, view)
    return _PackedIntegers(module, tensors, config, view)


class _PackedIntegers:
    def __init__(self, module: str, tensors: Mapping[str, TensorInfo], config: ConfigJson, view: ViewTensor) -> None:
        packed, scale, shape = required(module, ("weight_packed", "weight_scale", "weight_shape"), tensors)
        zeros, index = tensors.get(f"{module}.weight_zero_point"), tensors.get(f"{module}.weight_g_idx")
        check_matrix(packed, ("I32",))
        check_matrix(shape, ("I32", "I64"), (2,))
        rows, columns = (int(length) for length in view(shape).reshape(-1))
        if rows != packed.shape[0] or columns < 1:
            raise WeightError(f"{shape.name} states [{rows}, {columns}], {packed.name} has {packed.shape[0]} rows")
        self._bits, self._unpack = _bits(packed, columns, config)
        count = _group_count(scale, rows)
        self._groups = _groups(module, columns, count, None if index is None else view(index).reshape(-1))
        self._columns, self._scale_info = columns, scale
        self._packed, self._scales = view(packed), view(scale).reshape(-1, count)
        self._zeros, self._zeros_are_packed = self._zero_view(zeros, rows, count, view)
        unused = [tensors[part] for ending in _UNUSED if (part := f"{module}.{ending}") in tensors]
        found = [packed, *(info for info in (scale, shape, zeros, index) if info is not None), *unused]
        self.parts: tuple[str, ...] = tuple(info.name for info in found)
        total = sum(info.bytes for info in found)
        self.info = replace(packed, name=f"{module}.weight", shape=(rows, columns), dtype=LABEL, bytes=total)

    def _zero_view(
        self, zeros: TensorInfo | None, rows: int, count: int, view: ViewTensor
    ) -> tuple[Words | None, bool]:
        """The zero points [rows, groups], or words [words, groups] packed along the rows."""
        if zeros is None:
            return None, False
        if zeros.dtype == "I8":
            check_matrix(zeros, ("I8",), (rows, count))
            return view(zeros), False
        words = -(-rows * self._bits // 32) if self._unpack is unpack else -(-rows // (32 // self._bits))
        check_matrix(zeros, ("I32",), (words, count))
        return view(zeros), True

    def rows(self, first: int, last: int) -> F32:
        """Rows first..last in f32, each the exact product."""
        codes = self._unpack(self._packed[first:last], self._bits, 0, self._columns)
        stored = self._scales[first:last] if len(self._scales) > 1 else self._scales
        scales = np.broadcast_to(finite_scales(stored, self._scale_info), (last - first, self._scales.shape[1]))
        return dequantize(codes, self._zero_points(first, last), scales, self._groups)

    def _zero_points(self, first: int, last: int) -> F32 | float:
        """The zero points as codes: signed integers are stored with half the range added."""
        half = float(1 << self._bits - 1)
        if self._zeros is None:
            return half
        if not self._zeros_are_packed:
            return self._zeros[first:last].astype(np.float32) + np.float32(half)
        return np.ascontiguousarray(self._unpack(self._zeros.T, self._bits, first, last).T).astype(np.float32)


def _group_count(scale: TensorInfo, rows: int) -> int:
    """Scales of a row: 1 where there is one per row or one per tensor."""
    if scale.dtype not in FLOATS or scale.shape not in ((), (1,), (1, 1), (rows,)):
        check_matrix(scale, FLOATS, (rows, None))
        return scale.shape[1]
    return 1


def _groups(module: str, columns: int, count: int, index: np.ndarray[tuple[int, ...], Any] | None) -> Groups:
    size = -(-columns // count)
    if index is not None and index.min() >= 0:  # -1: columns are in order
        if len(index) != columns or index.max() >= count:
            raise WeightError(f"{module}.weight_g_idx names group {index.max()} of {count}, or not {columns} columns")
        in_order = np.array_equal(index, np.arange(columns) // size)
        return Groups(columns, size, None if in_order else index.astype(np.intp))
    if columns % count:
        raise WeightError(f"{module}.weight_scale has {count} groups, which do not divide {columns} columns")
    return Groups(columns, size)


def _bits(packed: TensorInfo, columns: int, config: ConfigJson) -> tuple[int, _Unpack]:
    """Bits and packing of a weight: those that give its width, the stated ones first."""
    stated = set(_stated_bits(config))
    width = packed.shape[1]
    fitting: list[tuple[int, _Unpack]] = [(bits, unpack) for bits in range(1, 9) if -(-columns * bits // 32) == width]
    fitting += [(bits, unpack_whole) for bits in (3, 5, 6, 7) if -(-columns // (32 // bits)) == width]
    chosen = [choice for choice in fitting if choice[0] in stated] or fitting
    if not chosen or len({bits for bits, _ in chosen}) > 1:
        raise WeightError(
            f"{packed.name} has {width} words for {columns} columns, which fit no number of bits of config.json "
            f"({', '.join(map(str, sorted(stated))) or 'none is stated'})"
        )
    return chosen[0]


def _stated_bits(config: ConfigJson) -> Iterator[int]:
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and type(weights.get("num_bits")) is int:
            yield weights["num_bits"]
