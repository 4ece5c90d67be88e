"""8-bit floats and integers with a scale per tensor, row, group or block, as the exact product in f32.

DeepSeek's `weight_scale_inv`, `weight_scale` of llm-compressor, FBGEMM and ModelOpt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgetune_converters.reading.prequantized.decoder import FLOATS, ConfigJson, ViewTensor, WeightError
from edgetune_converters.reading.prequantized.float4 import POWERS
from edgetune_converters.tensors import F32, FLOAT8, TensorInfo, to_f32

_BLOCK = (128, 128)
_MAX_SCALES = 2**28
_POWER_DTYPES = ("U8", "F8_E8M0")  # scales of MXFP8
# names of a weight's scales; DeepSeek's "inv" is the inverse of the divisor, so it is multiplied too
_SCALES = ("weight_scale_inv", "weight_scale")
# tensors that may accompany such a weight and do not affect it: scales of activations and of the cache
_UNUSED = ("input_scale", "output_scale", "activation_scale", "input_zero_point")


def scale_of(module: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """Return the name of a weight's scales, None where there are none."""
    return next((name for part in _SCALES if (name := f"{module}.{part}") in tensors), None)


class ScaledWeight:
    """Small floats or integers times scales: one per tensor, row, or block of rows and columns, minus a zero point."""

    def __init__(self, name: str, tensors: Mapping[str, TensorInfo], config: ConfigJson, view: ViewTensor) -> None:
        module = name.removesuffix(".weight")
        info = tensors[name]
        scale_name = scale_of(module, tensors)
        if scale_name is None:
            raise WeightError(f"{name} is {info.dtype}, but its scale ({' or '.join(_SCALES)}) is missing")
        if info.dtype not in (*FLOAT8, "I8") or len(info.shape) != 2 or not all(info.shape):
            raise WeightError(f"{name} is {info.dtype} {list(info.shape)}; with a scale 8-bit matrices are read")
        zeros = tensors.get(f"{module}.weight_zero_point")
        self._scales = _scale_grid(tensors[scale_name], info, config, view)
        self._zeros = None if zeros is None else _zero_grid(zeros, info, tensors[scale_name], self._scales, view)
        self._codes = view(info).reshape(info.shape)
        self._table = FLOAT8.get(info.dtype)
        unused = [part for part in (f"{module}.{other}" for other in _UNUSED) if part in tensors]
        self.parts: tuple[str, ...] = (name, scale_name, *([zeros.name] if zeros else []), *unused)
        self.info = replace(info, bytes=sum(tensors[part].bytes for part in self.parts))

    def rows(self, first: int, last: int) -> F32:
        """Rows first..last in f32, each the exact product, rounded once."""
        codes = self._codes[first:last]
        decoded = codes.astype(np.float32) if self._table is None else self._table[codes]
        if self._zeros is not None:
            decoded -= self._zeros(first, last)
        decoded *= self._scales(first, last)
        return decoded


@dataclass(frozen=True)
class _Grid:
    """Scales as a matrix [a, b], each for a block of `block` rows and columns."""

    values: F32
    block: tuple[int, int]
    columns: int

    def __call__(self, first: int, last: int) -> F32:
        """Return the scales of rows first..last, [rows, columns] or [rows, 1]."""
        rows = self.values[np.arange(first, last) // self.block[0]]
        if self.values.shape[1] == 1:
            return rows
        return np.repeat(rows, self.block[1], axis=1)[:, : self.columns]


def _scale_grid(scale: TensorInfo, weight: TensorInfo, config: ConfigJson, view: ViewTensor) -> _Grid:
    shape = scale.shape if len(scale.shape) == 2 else (math.prod(scale.shape), 1)
    if scale.dtype not in (*FLOATS, *_POWER_DTYPES) or len(scale.shape) > 2 or math.prod(shape) > _MAX_SCALES:
        raise WeightError(
            f"{scale.name} is {scale.dtype} {list(scale.shape)}; scales are matrices of {', '.join(FLOATS)}"
        )
    stated = _stated_block(config)
    block = [
        length if count == 1 else 1 if count == length else size
        for count, length, size in zip(shape, weight.shape, stated, strict=True)
    ]
    if shape[0] == weight.shape[0] and shape[1] and -(-weight.shape[1] // block[1]) != shape[1]:
        block[1] = -(-weight.shape[1] // shape[1])  # groups of a row, of a size that the shape shows
    if any(-(-length // size) != count for count, length, size in zip(shape, weight.shape, block, strict=True)):
        raise WeightError(
            f"{scale.name} has the shape {list(scale.shape)}, which does not fit {weight.name} {list(weight.shape)} in "
            f"blocks of {stated[0]} x {stated[1]}"
        )
    if scale.dtype in _POWER_DTYPES and block != [1, 32]:
        raise WeightError(f"{scale.name} is {scale.dtype} {list(scale.shape)}; powers of two are for 32 columns")
    stored = view(scale).reshape(shape)
    values = POWERS[stored] if scale.dtype in _POWER_DTYPES else to_f32(stored, scale.dtype)
    if not np.isfinite(values).all():
        raise WeightError(f"{scale.name} holds NaN or infinity")
    return _Grid(values, (block[0], block[1]), weight.shape[1])


def _stated_block(config: Mapping[str, Any]) -> Sequence[int]:
    """Rows and columns of a block, where config.json states them."""
    for block in (config.get("weight_block_size"), *_block_structures(config)):
        if isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
            return block
    return _BLOCK


def _block_structures(config: Mapping[str, Any]) -> Iterator[Any]:
    """llm-compressor states the block in each of its groups."""
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            yield weights.get("block_structure")


def _zero_grid(zeros: TensorInfo, weight: TensorInfo, scale: TensorInfo, grid: _Grid, view: ViewTensor) -> _Grid:
    """The zero points of integers, in the blocks of the scales."""
    if weight.dtype != "I8" or zeros.dtype not in ("I8", *FLOATS) or math.prod(zeros.shape) != grid.values.size:
        raise WeightError(
            f"{zeros.name} is {zeros.dtype} {list(zeros.shape)}, which does not fit {weight.dtype} weights and "
            f"{scale.name} {list(scale.shape)}"
        )
    return _Grid(to_f32(view(zeros).reshape(grid.values.shape), zeros.dtype), grid.block, grid.columns)
