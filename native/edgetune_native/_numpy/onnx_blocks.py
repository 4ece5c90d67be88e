"""Blocks of 4- and 8-bit codes: the operations of nbits_kernel.c in the same order, so the bytes are the same.

Arrays are [block_size, blocks]: a column is a block, and sums run down the columns one row after the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgetune_native._kernels import Buffer

from ._floats import widen
from .onnx_search import IntegerSearch
from .onnx_steps import F32, SMALLEST, Floats, add_rows, clamp, inverse_of, round_even, round_half_up

__all__ = ["dequantize_blocks", "quantize_blocks"]

_PIECE_ELEMENTS = 1 << 18

# Count, first and step of the scales tried, by (bits, symmetric); see struct grid in nbits_kernel.c.
_GRIDS = {
    (4, True): (8, -1.25, 0.8125),
    (4, False): (9, -1.25, 0.6875),
    (8, True): (32, -20.0, 0.71875),
    (8, False): (32, -40.0, 1.34375),
}
_MOVES_SIGN = (-1.0, 1.0, 1.0, 1.0)
_MOVES_ZERO = (-1.0, 1.0, 0.0, 0.0)


class _Blocks(NamedTuple):
    """The blocks to quantize, and their format."""

    x: Floats  # [block_size, blocks]
    w: Floats | None  # likewise; None: all alike
    bits: int
    symmetric: bool
    half: bool

    @property
    def top(self) -> np.float32:
        return F32(2**self.bits - 1)

    @property
    def middle(self) -> np.float32:
        return F32(2 ** (self.bits - 1))


class _Scales(NamedTuple):
    scale: Floats  # [blocks]
    zero: Floats  # [blocks]


def _stored(scale: Floats, half: bool) -> Floats:
    rounded = scale.astype(np.float16).astype(F32) if half else scale
    return np.where(np.abs(rounded) >= SMALLEST, rounded, F32(0))


def _codes(x: Floats, scales: _Scales, top: np.float32) -> Floats:
    codes: Floats = round_half_up(clamp(x * inverse_of(scales.scale) + scales.zero, F32(0), top))
    return codes


def _exact_error(blocks: _Blocks, scales: _Scales) -> NDArray[np.float64]:
    d = _codes(blocks.x, scales, blocks.top) - scales.zero
    r = blocks.x.astype(np.float64) - scales.scale.astype(np.float64) * d
    return add_rows(r * r if blocks.w is None else blocks.w.astype(np.float64) * (r * r))


class _Search:
    """The best scales so far. Errors are relative to the square of 1 / `unit`."""

    def __init__(self, blocks: _Blocks, start: _Scales, unit: Floats) -> None:
        self.blocks = blocks
        self.unit = unit
        self.error = np.full_like(start.scale, np.inf)
        self.scale, self.zero = start.scale, start.zero

    def _sums(self, inverse: Floats, zero: Floats) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Return the sums of w r^2, w r d and w d^2."""
        x, w = self.blocks.x, self.blocks.w
        t = x * inverse
        d = round_even(clamp(t, -zero, self.blocks.top - zero))
        r = t - d
        wr, wd = (r, d) if w is None else (w * r, w * d)
        return add_rows(wr * r), add_rows(wr * d), add_rows(wd * d)

    def attempt(self, inverse: Floats, zero: Floats) -> None:
        """Try the scale 1 / inverse, improved for the codes it gives."""
        rr, rd, dd = self._sums(inverse, zero)
        delta = rd / np.where(dd > 0, dd, F32(1))
        tried = F32(1) / inverse
        scale = tried + tried * delta
        if self.blocks.half:
            scale = scale.astype(np.float16).astype(F32)
            delta = scale * inverse - F32(1)
        ratio = self.unit / inverse
        error = ratio * ratio * (rr + (delta * delta * dd - F32(2) * delta * rd))
        better = (error < self.error) & (np.abs(scale) >= SMALLEST) & np.isfinite(scale)
        self.error = np.where(better, error, self.error)
        self.scale = np.where(better, scale, self.scale)
        self.zero = np.where(better, zero, self.zero)

    def grid(self, low: Floats, high: Floats) -> None:
        top, middle, symmetric = self.blocks.top, self.blocks.middle, self.blocks.symmetric
        count, first, step = _GRIDS[self.blocks.bits, symmetric]
        full = middle if symmetric else top
        for i in range(count):
            more = F32(first + i * step)
            side = F32(i % 3 - 1) * (more * F32(0.5))
            inverse = self.unit * ((full + more) / full)
            center = top * F32(0.5) - (high * F32(0.5) + low * F32(0.5)) * inverse
            zero = np.full_like(center, middle) if symmetric else round_even(clamp(center + side, F32(0), top))
            self.attempt(inverse, zero)

    def moves(self) -> None:
        for sign, step in zip(_MOVES_SIGN, _MOVES_ZERO, strict=True):
            if self.blocks.symmetric:
                self.attempt(F32(sign) / self.scale, self.zero)
            else:
                self.attempt(F32(1) / self.scale, clamp(self.zero + F32(step), F32(0), self.blocks.top))


def _quantize_columns(blocks: _Blocks, search: bool) -> tuple[_Scales, NDArray[np.uint8]]:
    x, top, middle = blocks.x, blocks.top, blocks.middle
    low, high = np.minimum(x.min(axis=0), F32(0)), np.maximum(x.max(axis=0), F32(0))
    if blocks.symmetric:
        wanted = np.where(high > -low, high, low) / -middle
        exact = _stored(wanted, False)
        zero = np.full_like(exact, middle)
    else:
        exact = _stored((high * F32(0.5) - low * F32(0.5)) / top * F32(2), False)
        zero = round_half_up(clamp(F32(0) - low / np.where(exact != 0, exact, F32(1)), F32(0), top))
    found = start = _Scales(_stored(exact, blocks.half), zero)
    if search:
        unit = np.where(start.scale != 0, F32(1) / exact, F32(0))
        found = _searched(blocks, start, unit, low, high)
    return found, _codes(x, found, top).astype(np.uint8)


def _searched(blocks: _Blocks, start: _Scales, unit: Floats, low: Floats, high: Floats) -> _Scales:
    """Return the best scales that the search of this format finds, and those of `start` where none is better."""
    if blocks.bits == 4 and blocks.w is None:
        integers = IntegerSearch(blocks.x, start.zero, unit, symmetric=blocks.symmetric, half=blocks.half)
        return _Scales(*integers.best(start.scale))
    best = _Search(blocks, start, unit)
    best.grid(low, high)
    best.moves()
    after = _exact_error(blocks, _Scales(best.scale, best.zero))
    better = after < _exact_error(blocks, start)
    return _Scales(np.where(better, best.scale, start.scale), np.where(better, best.zero, start.zero))


def _pack(values: NDArray[np.uint8], bits: int, padding: int) -> NDArray[np.uint8]:
    """[..., count] -> [..., ceil(count * bits / 8)], the first of two in the low half."""
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        widths = [(0, 0)] * (values.ndim - 1) + [(0, 1)]
        values = np.pad(values, widths, constant_values=padding)
    packed: NDArray[np.uint8] = values[..., ::2] | values[..., 1::2] << np.uint8(4)
    return packed


def _unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], 2 * packed.shape[-1])[..., :count]


def _columns(values: Floats, block_size: int) -> Floats:
    """[n, k] -> [block_size, n * k_blocks], filled up with zeros."""
    filled = np.pad(values, ((0, 0), (0, -values.shape[1] % block_size)))
    return np.ascontiguousarray(filled.reshape(-1, block_size).T)


def _proportions(weights: Floats) -> Floats:
    """Return the weights times a power of two, so that sums do not overflow."""
    exponent = np.frexp(weights.max())[1]
    scaled: Floats = np.ldexp(weights, -exponent)
    return scaled


def quantize_blocks(
    rows: Buffer,
    dtype: int,
    n: int,
    k: int,
    weights: Buffer | None,
    bits: int,
    block_size: int,
    symmetric: bool,
    search: bool,
    half_scales: bool,
    codes: Buffer,
    scales: Buffer,
    zero_points: Buffer | None,
    threads: int,
    /,
) -> None:
    """rows[n, k] -> codes[n, k_blocks, block bytes], scales[n, k_blocks], zero_points[n, packed]."""
    with np.errstate(all="ignore"):
        proportions = None if weights is None or not search else _proportions(weights)
        step = max(1, _PIECE_ELEMENTS // k)
        for begin in range(0, n, step):
            x = widen(rows[begin : begin + step], dtype)
            wrong = np.flatnonzero(~np.isfinite(x).all(axis=1))
            w = None if proportions is None else _columns(np.broadcast_to(proportions, x.shape), block_size)
            good = x[: wrong[0]] if wrong.size else x
            columns = _Blocks(_columns(x, block_size), w, bits, symmetric, half_scales)
            found, found_codes = _quantize_columns(columns, search)
            shape = (len(x), -(-k // block_size))
            too_large = np.flatnonzero(~np.isfinite(found.scale.reshape(shape)[: len(good)]).all(axis=1))
            if too_large.size:
                raise ValueError(
                    f"row {begin + too_large[0]} needs a scale above 65504, the largest float16; use float32 scales"
                )
            if wrong.size:
                raise ValueError(f"row {begin + wrong[0]} holds a NaN or an infinity, expected finite weights")
            scales[begin : begin + step] = found.scale.reshape(shape)
            codes[begin : begin + step] = _pack(found_codes.T.reshape(*shape, block_size), bits, 0)
            if zero_points is not None:
                zeros = found.zero.astype(np.uint8).reshape(shape)
                zero_points[begin : begin + step] = _pack(zeros, bits, 8)


def dequantize_blocks(
    codes: Buffer,
    scales: Buffer,
    half_scales: bool,
    zero_points: Buffer | None,
    bits: int,
    block_size: int,
    n: int,
    k: int,
    out: Buffer,
    threads: int,
    /,
) -> None:
    """Blocks -> out[n, k] f32."""
    k_blocks = scales.shape[1]
    zeros = np.full((n, k_blocks), 2 ** (bits - 1), np.uint8)
    if zero_points is not None:
        zeros = _unpack(zero_points, bits, k_blocks)
    d = _unpack(codes, bits, block_size).astype(F32) - zeros[..., None].astype(F32)
    with np.errstate(all="ignore"):
        out[:] = (scales[..., None].astype(F32) * d).reshape(n, k_blocks * block_size)[:, :k]
