"""The formats of bitsandbytes. Each step is one float32 operation, in the order of bitsandbytes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgetune_native._kernels import F16, F32, Buffer

from ._floats import widen

__all__ = [
    "absmax_4bit",
    "dequantize_4bit",
    "dequantize_int8",
    "nest_absmax",
    "quantize_4bit",
    "roundtrip_4bit",
    "torch_mean",
    "unnest_absmax",
]

_SMALLEST = np.float32(1e-38)


def _rounded(values: NDArray[np.float32], dtype: int) -> NDArray[np.float32]:
    """Round to the nearest value of dtype, ties to even."""
    if dtype == F32:
        return values
    if dtype == F16:
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    not_a_number = (bits | 0x00400000) & 0xFFFF0000
    wide: NDArray[np.float32] = np.where(np.isnan(values), not_a_number, rounded).astype(np.uint32).view(np.float32)
    return wide


def _blocks(flat: NDArray[np.float32], blocksize: int) -> NDArray[np.float32]:
    """Return [blocks, blocksize], the last block padded with zeros."""
    return np.pad(flat, (0, -flat.size % blocksize)).reshape(-1, blocksize)


def absmax_4bit(rows: Buffer, dtype: int, n: int, k: int, blocksize: int, absmax: Buffer, threads: int, /) -> None:
    """rows[n, k] -> absmax[blocks] f32."""
    flat = widen(rows, dtype).reshape(-1)
    wrong = np.flatnonzero(~np.isfinite(flat))
    if wrong.size:
        raise ValueError(f"row {wrong[0] // k} holds a NaN or an infinity, expected finite weights")
    absmax[...] = np.abs(_blocks(flat, blocksize)).max(axis=1, initial=0)
    if flat.size % blocksize:
        absmax[-1] = max(absmax[-1], _SMALLEST)


def _cascade(steps: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sum steps[count, width] over the first axis through four levels, as PyTorch does (see bnb_absmax.c)."""
    count, width = steps.shape
    power = max(4, (max(count, 1) - 1).bit_length() // 4)
    level = np.zeros((4, width), np.float32)
    whole = count >> power
    for piece in range(whole):
        for step in steps[piece << power : (piece + 1) << power]:
            level[0] += step
        for upper in range(1, 4):
            level[upper] += level[upper - 1]
            level[upper - 1] = 0
            if (piece + 1) % (1 << (upper * power)):
                break
    for step in steps[whole << power :]:
        level[0] += step
    for upper in range(1, 4):
        level[0] += level[upper]
    total: NDArray[np.float32] = level[0]
    return total


def _sum_vectors(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sum vectors[count, lanes] over the first axis, four vectors a step."""
    count, lanes = vectors.shape
    whole = count // 4 * 4
    part = _cascade(vectors[:whole].reshape(-1, 4 * lanes)).reshape(4, lanes)
    for vector in vectors[whole:]:
        part[0] += vector
    for other in part[1:]:
        part[0] += other
    total: NDArray[np.float32] = part[0]
    return total


def _serial_sum(values: NDArray[np.float32]) -> np.float32:
    lanes = 8
    if values.size < lanes:
        alone: np.float32 = _sum_vectors(values.reshape(-1, 1))[0]
        return alone
    whole = values.size // lanes * lanes
    total = np.float32(0)
    for value in (*values[whole:], *_sum_vectors(values[:whole].reshape(-1, lanes))):
        total = np.float32(total + value)
    return total


def torch_mean(values: Buffer, count: int, torch_threads: int, /) -> float:
    """Return the f32 mean of values[count] f32, added in PyTorch's order on that many threads."""
    grain = 32768
    with np.errstate(over="ignore", invalid="ignore"):
        if torch_threads == 1 or count < grain:
            return float(_serial_sum(values) / np.float32(count))
        used = min(torch_threads, -(-count // grain))
        each = -(-count // used)
        parts = np.zeros(torch_threads, np.float32)
        for thread in range(-(-count // each)):
            parts[thread] = _serial_sum(values[thread * each : (thread + 1) * each])
        return float(_serial_sum(parts) / np.float32(count))


def nest_absmax(
    absmax: Buffer,
    count: int,
    offset: float,
    nearest: Buffer,
    blocksize: int,
    codes: Buffer,
    nested_absmax: Buffer,
    threads: int,
    /,
) -> None:
    """absmax[count] f32, nearest[65536] u8 -> codes[count] u8, nested_absmax[nested blocks] f32."""
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        blocks = _blocks(absmax - np.float32(offset), blocksize)
        nested_absmax[...] = np.abs(blocks).max(axis=1, initial=0)
        scaled = blocks * (np.float32(1) / nested_absmax)[:, None]
    inside = np.where(scaled > -1, np.minimum(scaled, np.float32(1)), np.float32(-1))  # NaN: -1
    half = (inside + np.float32(1)) * np.float32(0.5)
    step = (half.astype(np.float64) * (nearest.size - 1) + 0.5).astype(np.float32).astype(np.int64)
    found = np.where(nested_absmax[:, None] > 0, nearest[step], np.uint8(0))
    codes[...] = found.reshape(-1)[:count]


def unnest_absmax(
    codes: Buffer,
    count: int,
    quant_map: Buffer,
    nested_absmax: Buffer,
    blocksize: int,
    offset: float,
    absmax: Buffer,
    threads: int,
    /,
) -> None:
    """codes[count] u8, quant_map[256] f32, nested_absmax[nested blocks] f32 -> absmax[count] f32."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        scales = np.repeat(nested_absmax, blocksize)[:count]
        absmax[...] = quant_map[codes] * scales + np.float32(offset)


def _codes(rows: Buffer, dtype: int, absmax: Buffer, blocksize: int, values: Buffer) -> NDArray[np.uint8]:
    """Return the code of each element, flat."""
    flat = widen(rows, dtype).reshape(-1)
    order = np.argsort(values, kind="stable")
    bounds = (values[order[:-1]] + values[order[1:]]) / np.float32(2)
    with np.errstate(over="ignore", under="ignore"):
        scaled = _blocks(flat, blocksize) * (np.float32(1) / np.maximum(absmax, _SMALLEST))[:, None]
        if flat.size % blocksize:
            scaled[-1] = _blocks(flat, blocksize)[-1] / absmax[-1]
    ranks = np.searchsorted(bounds, scaled.reshape(-1)[: flat.size], side="left")
    return order.astype(np.uint8)[ranks]


def quantize_4bit(
    rows: Buffer,
    dtype: int,
    n: int,
    k: int,
    absmax: Buffer,
    blocksize: int,
    values: Buffer,
    packed: Buffer,
    threads: int,
    /,
) -> None:
    """rows[n, k], absmax[blocks] f32, values[16] f32 -> packed[ceil(n k / 2)] u8."""
    codes = _codes(rows, dtype, absmax, blocksize, values)
    if codes.size % 2:  # filled up with a zero
        codes = np.append(codes, _codes(np.zeros(1, np.float32), F32, np.ones(1, np.float32), 2, values))
    packed[...] = codes[::2] << 4 | codes[1::2]


def _weights(
    codes: NDArray[np.uint8], absmax: Buffer, blocksize: int, values: Buffer, dtype: int
) -> NDArray[np.float32]:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        products = values[codes] * np.repeat(absmax, blocksize)[: codes.size]
    return _rounded(products, dtype)


def dequantize_4bit(
    packed: Buffer,
    count: int,
    absmax: Buffer,
    blocksize: int,
    values: Buffer,
    dtype: int,
    out: Buffer,
    threads: int,
    /,
) -> None:
    """packed[ceil(count / 2)] u8, absmax[blocks] f32, values[16] f32 -> out[count] f32, rounded to dtype."""
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:count]
    out.reshape(-1)[...] = _weights(codes, absmax, blocksize, values, dtype)


def roundtrip_4bit(
    rows: Buffer,
    dtype: int,
    n: int,
    k: int,
    absmax: Buffer,
    scales: Buffer,
    blocksize: int,
    values: Buffer,
    to: int,
    out: Buffer,
    threads: int,
    /,
) -> None:
    """quantize_4bit with absmax, then dequantize_4bit with scales: rows[n, k] -> out[n, k] f32, rounded to `to`."""
    codes = _codes(rows, dtype, absmax, blocksize, values)
    out.reshape(-1)[...] = _weights(codes, scales, blocksize, values, to)


def dequantize_int8(codes: Buffer, scb: Buffer, n: int, k: int, dtype: int, out: Buffer, threads: int, /) -> None:
    """codes[n, k] i8, scb[n] f32 -> out[n, k] f32, rounded to dtype."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        products = codes.astype(np.float32) * scb[:, None] * np.float32(7.874015718698502e-3)
    out[...] = _rounded(products, dtype)
