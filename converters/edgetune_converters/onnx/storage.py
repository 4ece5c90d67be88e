"""Storage of weights in ONNX files: floats, or blocks of integers with scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

import edgetune_native
from edgetune_converters.quantization.encode import encode_rows
from edgetune_converters.tensors import F32

ALIGNMENT = 4096  # a page, as arrays are mapped one by one


class ArraySpec(NamedTuple):
    """One array of a stored weight: suffix of its name, TensorProto type, shape and bytes."""

    suffix: str
    dtype: int
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Floats:
    """Unquantized weights."""

    name: Literal["f32", "f16"] = "f32"

    def specs(self, shape: tuple[int, ...]) -> list[ArraySpec]:
        """Return the only array."""
        kind, size = (TensorProto.FLOAT, 4) if self.name == "f32" else (TensorProto.FLOAT16, 2)
        return [ArraySpec("", kind, shape, size * math.prod(shape))]

    def store(
        self, rows: NDArray[Any], name: str, threads: int, weights: F32 | None = None
    ) -> Sequence[NDArray[np.uint8]]:
        """Return rows as bytes. Raises RecipeError where f16 would overflow."""
        return [np.ascontiguousarray(encode_rows(rows, self.name, name, threads)).view(np.uint8)]


@dataclass(frozen=True)
class NBitsBlocks:
    """Blocks of `block` weights along a row for MatMulNBits: scale * (integer - zero point).

    `accuracy` is the operator's accuracy_level: 0 computes in f32, 4 with activations in 8 bits.
    """

    bits: Literal[4, 8]
    block: int = 32
    symmetric: bool = True
    accuracy: int = 4

    @property
    def name(self) -> str:
        """Name in plans and receipts: int4/32, or int4/32z with zero points."""
        return f"int{self.bits}/{self.block}" + ("" if self.symmetric else "z")

    def specs(self, shape: tuple[int, ...]) -> list[ArraySpec]:
        """Return integers [..., n, blocks, bytes], scales f32 [..., n, blocks] and, where asymmetric, zero points."""
        *lead, columns = shape
        blocks, blob = -(-columns // self.block), self.block * self.bits // 8
        packed = -(-blocks * self.bits // 8)
        rows = math.prod(lead)
        specs = [
            ArraySpec(".codes", TensorProto.UINT8, (*lead, blocks, blob), rows * blocks * blob),
            ArraySpec(".scales", TensorProto.FLOAT, (*lead, blocks), rows * blocks * 4),
        ]
        zeros = ArraySpec(".zero_points", TensorProto.UINT8, (*lead, packed), rows * packed)
        return specs if self.symmetric else [*specs, zeros]

    def store(
        self, rows: NDArray[Any], name: str, threads: int, weights: F32 | None = None
    ) -> Sequence[NDArray[np.uint8]]:
        """Return rows as integers, scales and zero points; `weights` [k] are importance weights of the columns."""
        kind: dict[str, Any] = {"block_size": self.block, "symmetric": self.symmetric, "search": _searched(self.bits)}
        made = edgetune_native.quantize_blocks(rows, self.bits, **kind, weights=weights, threads=threads)
        return [array.view(np.uint8) for array in made if array is not None]

    def dequantize(self, arrays: Sequence[NDArray[np.uint8]], shape: tuple[int, int]) -> F32:
        """Return the dequantized rows, f32 of `shape` [n, k]."""
        codes, scales, *zeros = arrays
        made = (codes, scales.view(np.float32), zeros[0] if zeros else None)
        return edgetune_native.dequantize_blocks(*made, bits=self.bits, block_size=self.block, k=shape[1])


@dataclass(frozen=True)
class StandardBlocks:
    """Blocks for the standard's DequantizeLinear: signed integers, zero point 0. Rows are multiples of the block."""

    bits: Literal[4, 8]
    block: int = 32

    @property
    def name(self) -> str:
        """Name in plans and receipts."""
        return f"int{self.bits}/{self.block}"

    def specs(self, shape: tuple[int, ...]) -> list[ArraySpec]:
        """Return integers of the shape of the weight, and scales f32 [..., n, blocks]."""
        *lead, columns = shape
        blocks, count = columns // self.block, math.prod(shape)
        kind = TensorProto.INT4 if self.bits == 4 else TensorProto.INT8
        scales = (*lead, blocks)
        return [
            ArraySpec(".codes", kind, shape, count * self.bits // 8),
            ArraySpec(".scales", TensorProto.FLOAT, scales, math.prod(scales) * 4),
        ]

    def store(
        self, rows: NDArray[Any], name: str, threads: int, weights: F32 | None = None
    ) -> Sequence[NDArray[np.uint8]]:
        """Return rows as integers and scales. Flipping the highest bit subtracts the midpoint."""
        kind: dict[str, Any] = {"block_size": self.block, "search": _searched(self.bits)}
        made = edgetune_native.quantize_blocks(rows, self.bits, **kind, weights=weights, threads=threads)
        middle = np.uint8(0x88 if self.bits == 4 else 0x80)
        return [made.codes ^ middle, made.scales.view(np.uint8)]


def _searched(bits: int) -> bool:
    """Whether to search for the best scales. At 8 bits that takes five times as long for a tenth of a tiny error."""
    return bits == 4


Storage = Floats | NBitsBlocks | StandardBlocks
