"""Integers of 1 to 8 bits packed into words, and their product with the scales of groups of columns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.tensors import F32

Codes = NDArray[np.uint8]
Words = NDArray[Any]

WORDS = ("I32", "I16", "I8", "I64", "U8", "U16", "U32", "U64")
"""The dtypes of words with packed integers; GPTQ's are 32 bits unless `pack_dtype` says otherwise."""

_TABLE_TYPES: dict[int, Any] = {1: np.uint64, 2: np.uint32, 4: np.uint16}


@cache
def _table(bits: int) -> NDArray[Any]:
    """For each byte, its codes as the bytes of one number."""
    codes = np.stack([np.arange(256) >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], axis=1)
    table: NDArray[Any] = np.ascontiguousarray(codes.astype(np.uint8)).view(_TABLE_TYPES[bits])
    return table.reshape(256)


def unpack(words: Words, bits: int, first: int, last: int) -> Codes:
    """Return codes first..last of each row of words, [rows, last - first].

    The codes of a row are packed without gaps, also across words, the first in the lowest bits.
    """
    width = words.itemsize * 8
    begin = first // width * width  # where a code begins with a word
    block = np.ascontiguousarray(words[:, begin * bits // width : -(-last * bits // width)])
    codes = _unpacked(block.view(np.uint8), bits)
    return codes[:, first - begin : last - begin]


def _unpacked(raw: Codes, bits: int) -> Codes:
    """All codes of rows of bytes."""
    if bits == 8:
        return raw
    if bits in _TABLE_TYPES:
        codes: Codes = _table(bits)[raw].view(np.uint8)
        return codes.reshape(len(raw), -1)
    padded = np.pad(raw, ((0, 0), (0, -raw.shape[1] % bits)))
    eights = padded.reshape(len(raw), -1, bits)  # 8 codes are as many bytes as a code has bits
    joined = np.zeros(eights.shape[:2], np.uint64)
    for place in range(bits):
        joined |= eights[..., place].astype(np.uint64) << np.uint64(8 * place)
    eight: Codes = np.empty((len(raw), joined.shape[1] * 8), np.uint8)
    for place in range(8):
        eight[:, place::8] = (joined >> np.uint64(place * bits)) & np.uint64((1 << bits) - 1)
    return eight


def unpack_whole(words: Words, bits: int, first: int, last: int) -> Codes:
    """As `unpack`, for words that hold whole codes only, with unused bits at the top (old compressed-tensors)."""
    per_word = words.itemsize * 8 // bits
    begin = first // per_word
    block = words[:, begin : -(-last // per_word)]
    shifts = np.arange(per_word, dtype=block.dtype) * block.dtype.type(bits)
    codes: Codes = (block[:, :, None] >> shifts & block.dtype.type((1 << bits) - 1)).astype(np.uint8)
    return codes.reshape(len(words), -1)[:, first - begin * per_word : last - begin * per_word]


# bits -> the width and the lowest bit of each plane of GPTQModel's gptq_p
_PLANES = {3: ((2, 0), (1, 2)), 5: ((4, 0), (1, 4)), 6: ((4, 0), (2, 4)), 7: ((4, 0), (2, 4), (1, 6))}


def unpack_planes(words: Words, bits: int, first: int, last: int) -> Codes:
    """As `unpack`, for 32 codes split into planes in words of 32 bits: the low bits of all, then higher ones."""
    planes = _PLANES.get(bits)
    if planes is None:  # a single plane
        return unpack(words, bits, first, last)
    begin = first // 32
    block = np.ascontiguousarray(words[:, begin * bits : -(-last // 32) * bits]).reshape(len(words), -1, bits)
    codes: Codes = np.zeros((len(words), block.shape[1] * 32), np.uint8)
    for width, shift in planes:  # a plane has as many words as its codes have bits
        plane = np.ascontiguousarray(block[:, :, shift : shift + width]).reshape(len(words), -1)
        codes |= unpack(plane, width, 0, codes.shape[1]) << np.uint8(shift)
    return codes[:, first - begin * 32 : last - begin * 32]


@dataclass(frozen=True)
class Groups:
    """The group of columns to which each column belongs: `size` neighbors, or a group for each column in `index`."""

    columns: int
    size: int
    index: NDArray[np.intp] | None = None

    @property
    def count(self) -> int:
        """The number of groups of neighbors."""
        return -(-self.columns // self.size)


def dequantize(codes: Codes, zeros: F32 | float, scales: F32, groups: Groups) -> F32:
    """Return (code - zero) * scale in f32, each product rounded once.

    Args:
        codes: [rows, columns].
        zeros: Zero points, [rows, groups], or one for all.
        scales: [rows, groups].
        groups: Which column has which group.
    """
    values = codes.astype(np.float32)
    index = groups.index
    if index is None and groups.columns % groups.size:
        index = np.arange(groups.columns) // groups.size
    if index is None:
        grouped = values.reshape(len(values), groups.count, groups.size)
        grouped -= zeros[..., None] if isinstance(zeros, np.ndarray) else np.float32(zeros)
        grouped *= scales[..., None]
        return values
    # np.take is ten times as fast here as indexing
    values -= np.take(zeros, index, axis=1) if isinstance(zeros, np.ndarray) else np.float32(zeros)
    values *= np.take(scales, index, axis=1)
    return values
