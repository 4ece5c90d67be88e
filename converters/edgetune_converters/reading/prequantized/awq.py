"""AWQ: integers of 4 bits with scale and zero point per group of input columns, in the layouts of AutoAWQ's kernels.

gemm: `qweight` [columns, rows / 8] and `qzeros` [groups, rows / 8], nibbles in the order 0 2 4 6 1 3 5 7, `scales`
[groups, rows]. gemv: `qweight` [rows, columns / 8] in order, `qzeros` [rows, groups / 8] and `scales` [rows, groups],
padded. gemv_fast: 16-bit words of four interleaved rows, `qzeros` with minus scale times zero point in f16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from edgetune_converters.reading.prequantized.decoder import (
    FLOATS,
    ConfigJson,
    MakeDecoder,
    ViewTensor,
    WeightDecoder,
    WeightError,
    check_matrix,
    finite_scales,
    required,
)
from edgetune_converters.reading.prequantized.packed import Groups, Words, dequantize, unpack
from edgetune_converters.tensors import F32, TensorInfo

LABEL = "AWQ"
_PER_WORD = 8
_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble in which each of eight neighbors is stored
_SYMMETRIC_ZERO = 8.0
_INTERLEAVED = 4  # rows of gemv_fast
_STRIDE = 64  # columns of gemv_fast that are stored together


def awq_weight(name: str, tensors: Mapping[str, TensorInfo], config: ConfigJson, view: ViewTensor) -> WeightDecoder:
    """Return the decoder of the layout that config.json states (`version`, in newer files `format`)."""
    if config.get("bits", config.get("w_bit", 4)) != 4:
        raise WeightError(f"{name}: AWQ with {config.get('bits')} bits; 4 are read")
    return _LAYOUTS[layout_of(config)](name, tensors, config, view)


def layout_of(config: ConfigJson) -> str:
    """Return the layout in lower case; gemm where none is stated."""
    return str(config.get("version") or config.get("format") or config.get("checkpoint_format") or "gemm").lower()


def _group_size(name: str, config: ConfigJson, columns: int) -> int:
    size = config.get("group_size", config.get("q_group_size", -1))
    if type(size) is not int or (size > 0 and columns % size):
        raise WeightError(f"{name}: groups of {size} do not divide its {columns} columns")
    return size if size > 0 else columns


class _Awq:
    """What the layouts have in common: the parts, and the description of the weight."""

    def __init__(self, name: str, tensors: Mapping[str, TensorInfo], config: ConfigJson) -> None:
        self._module = name.removesuffix(".qweight")
        self._qweight, self._scales = required(self._module, ("qweight", "scales"), tensors)
        self._qzeros = tensors.get(f"{self._module}.qzeros")
        if self._qzeros is None and config.get("zero_point", True):
            raise WeightError(f"{self._module}.qzeros is missing, and config.json does not state zero_point: false")
        found = [info for info in (self._qweight, self._scales, self._qzeros) if info is not None]
        self.parts: tuple[str, ...] = tuple(info.name for info in found)
        self._bytes = sum(info.bytes for info in found)

    def _info(self, rows: int, columns: int) -> TensorInfo:
        name = f"{self._module}.weight"
        return replace(self._qweight, name=name, shape=(rows, columns), dtype=LABEL, bytes=self._bytes)


class _Gemm(_Awq):
    def __init__(self, name: str, tensors: Mapping[str, TensorInfo], config: ConfigJson, view: ViewTensor) -> None:
        super().__init__(name, tensors, config)
        check_matrix(self._qweight, ("I32",))
        columns, words = self._qweight.shape
        self._groups = Groups(columns, _group_size(name, config, columns))
        check_matrix(self._scales, FLOATS, (self._groups.count, words * _PER_WORD))
        if self._qzeros is not None:
            check_matrix(self._qzeros, ("I32",), (self._groups.count, words))
        self._words, self._steps = view(self._qweight), view(self._scales)
        self._zero_words = None if self._qzeros is None else view(self._qzeros)
        self.info = self._info(words * _PER_WORD, columns)

    def rows(self, first: int, last: int) -> F32:
        """Rows first..last in f32, each the exact product."""
        scales = finite_scales(self._steps[:, first:last].T, self._scales)
        zeros: F32 | float = _SYMMETRIC_ZERO
        if self._zero_words is not None:
            zeros = _rows_of_words(self._zero_words, first, last).astype(np.float32)
        return dequantize(_rows_of_words(self._words, first, last), zeros, scales, self._groups)


def _rows_of_words(words: Words, first: int, last: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Codes of rows first..last, [last - first, columns]: eight rows are in each column of words."""
    begin = first // _PER_WORD
    block = np.ascontiguousarray(words[:, begin : -(-last // _PER_WORD)].T).view(np.uint32)
    codes = np.empty((len(block), _PER_WORD, block.shape[1]), np.uint8)
    for place, nibble in enumerate(_NIBBLES):
        codes[:, place] = block >> np.uint32(4 * nibble) & np.uint32(15)
    return codes.reshape(-1, block.shape[1])[first - begin * _PER_WORD : last - begin * _PER_WORD]


class _Gemv(_Awq):
    def __init__(self, name: str, tensors: Mapping[str, TensorInfo], config: ConfigJson, view: ViewTensor) -> None:
        super().__init__(name, tensors, config)
        check_matrix(self._qweight, ("I32",))
        rows, words = self._qweight.shape
        columns = words * _PER_WORD
        self._groups = Groups(columns, _group_size(name, config, columns))
        check_matrix(self._scales, FLOATS, (rows, None))
        if self._qzeros is not None:
            check_matrix(self._qzeros, ("I32",), (rows, None))
        padded = [self._scales.shape[1], *([self._qzeros.shape[1] * _PER_WORD] if self._qzeros else [])]
        if min(padded) < self._groups.count:
            raise WeightError(f"{self._module} has scales or zeros of {min(padded)} groups, not {self._groups.count}")
        self._words, self._steps = view(self._qweight), view(self._scales)
        self._zero_words = None if self._qzeros is None else view(self._qzeros)
        self.info = self._info(rows, columns)

    def rows(self, first: int, last: int) -> F32:
        """Rows first..last in f32, each the exact product."""
        count = self._groups.count
        scales = finite_scales(self._steps[first:last, :count], self._scales)
        zeros: F32 | float = _SYMMETRIC_ZERO
        if self._zero_words is not None:
            zeros = unpack(self._zero_words[first:last], 4, 0, count).astype(np.float32)
        return dequantize(unpack(self._words[first:last], 4, 0, self._groups.columns), zeros, scales, self._groups)


class _GemvFast(_Awq):
    def __init__(self, name: str, tensors: Mapping[str, TensorInfo], config: ConfigJson, view: ViewTensor) -> None:
        super().__init__(name, tensors, config)
        check_matrix(self._qweight, ("I16",))
        rows, columns = self._qweight.shape[0] * _INTERLEAVED, self._qweight.shape[1]
        if self._qzeros is None or columns % _STRIDE:
            raise WeightError(f"{self._module} has {columns} columns or no zeros; whole runs of {_STRIDE} are read")
        self._groups = Groups(columns, _group_size(name, config, columns))
        for info in (self._scales, self._qzeros):
            check_matrix(info, FLOATS, (None, rows))
            if info.shape[0] < self._groups.count:
                raise WeightError(f"{info.name} has {info.shape[0]} groups, not {self._groups.count}")
        self._words, self._steps, self._shifts = (view(info) for info in (self._qweight, self._scales, self._qzeros))
        self._shifts_info = self._qzeros
        self.info = self._info(rows, columns)

    def rows(self, first: int, last: int) -> F32:
        """Rows first..last: code times scale plus the stored product of scale and zero point, in f32."""
        begin, count = first // _INTERLEAVED, self._groups.count
        codes = _without_interleaving(self._words[begin : -(-last // _INTERLEAVED)])
        codes = codes[first - begin * _INTERLEAVED : last - begin * _INTERLEAVED]
        scales = finite_scales(self._steps[:count, first:last].T, self._scales)
        shifts = finite_scales(self._shifts[:count, first:last].T, self._shifts_info)
        values = dequantize(codes, 0.0, scales, self._groups).reshape(len(codes), count, -1)
        values += shifts[..., None]
        return values.reshape(codes.shape)


def _without_interleaving(
    words: Words,
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Codes [rows, columns] of words [rows / 4, columns], each a nibble of four rows; AutoAWQ's packing undone."""
    fours, columns = words.shape
    nibbles = unpack(words, 4, 0, columns * _INTERLEAVED)
    codes = nibbles.reshape(fours, columns // _STRIDE, _INTERLEAVED, _STRIDE).transpose(0, 2, 1, 3)
    codes = codes.reshape(fours * _INTERLEAVED, columns // 32, 4, 2, 4).transpose(0, 1, 2, 4, 3)
    codes = codes.reshape(fours * _INTERLEAVED, columns // 32, 4, 4, 2).transpose(0, 1, 3, 2, 4)
    return np.ascontiguousarray(codes).reshape(fours * _INTERLEAVED, columns)


_LAYOUTS: dict[str, MakeDecoder] = {"gemm": _Gemm, "exllama": _Gemm, "ipex": _Gemm, "gemv": _Gemv}
_LAYOUTS |= dict.fromkeys(("gemv_fast", "llm-awq"), _GemvFast)
LAYOUTS = tuple(_LAYOUTS)
"""The values of `version` that are read."""
