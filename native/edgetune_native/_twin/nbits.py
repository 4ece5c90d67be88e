"""Block quantization to 4 and 8 bits: the operations of nbits_kernel.h, in the same order, so the bytes are the same.

Arrays are [block_size, blocks]: a column is a block, and sums run down the columns one row after the other.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgetune_native._kernels import Buffer

from .ggml import widen

_F32 = np.float32
_Floats = NDArray[np.float32]

_ROUNDER = _F32(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds |x| < 2^22 to a whole number, half to even
_SMALLEST = np.finfo(np.float32).tiny
_PIECE_ELEMENTS = 1 << 18

# Count, first and step of the scales tried, by (bits, symmetric); see struct grid in nbits_kernel.h.
_GRIDS = {
    (4, True): (8, -1.25, 0.8125),
    (4, False): (9, -1.25, 0.6875),
    (8, True): (32, -20.0, 0.71875),
    (8, False): (32, -40.0, 1.34375),
}
_MOVES_SIGN = (-1.0, 1.0, 1.0, 1.0)
_MOVES_ZERO = (-1.0, 1.0, 0.0, 0.0)


class _Blocks(NamedTuple):
    """What is to be quantized, and how."""

    x: _Floats  # [block_size, blocks]
    w: _Floats | None  # likewise; None: all alike
    bits: int
    symmetric: bool
    half: bool

    @property
    def top(self) -> np.float32:
        return _F32(2**self.bits - 1)

    @property
    def middle(self) -> np.float32:
        return _F32(2 ** (self.bits - 1))


class _Scales(NamedTuple):
    scale: _Floats  # [blocks]
    zero: _Floats  # [blocks]


def _round_even(x: Any) -> Any:
    return (x + _ROUNDER) - _ROUNDER


def _round_half_up(x: Any) -> Any:
    even = _round_even(x)
    return np.where(x - even == _F32(0.5), even + _F32(1), even)


def _clamp(x: Any, low: Any, high: Any) -> Any:
    return np.minimum(np.maximum(x, low), high)


def _stored(scale: _Floats, half: bool) -> _Floats:
    rounded = scale.astype(np.float16).astype(_F32) if half else scale
    return np.where(np.abs(rounded) >= _SMALLEST, rounded, _F32(0))


def _add_rows(terms: NDArray[Any]) -> NDArray[Any]:
    """Add up down the columns; numpy's own sum may pair the terms otherwise."""
    total: NDArray[Any] = functools.reduce(np.add, terms)
    return total


def _codes(x: _Floats, scales: _Scales, top: np.float32) -> _Floats:
    inverse = np.where(scales.scale != 0, _F32(1) / scales.scale, _F32(0))
    codes: _Floats = _round_half_up(_clamp(x * inverse + scales.zero, _F32(0), top))
    return codes


def _exact_error(blocks: _Blocks, scales: _Scales) -> NDArray[np.float64]:
    d = _codes(blocks.x, scales, blocks.top) - scales.zero
    r = blocks.x.astype(np.float64) - scales.scale.astype(np.float64) * d
    return _add_rows(r * r if blocks.w is None else blocks.w.astype(np.float64) * (r * r))


class _Search:
    """The best scales so far; errors in units of the square of the scale that takes in all."""

    def __init__(self, blocks: _Blocks, start: _Scales, exact: _Floats) -> None:
        self.blocks = blocks
        self.unit = np.where(start.scale != 0, _F32(1) / exact, _F32(0))
        self.error = np.full_like(start.scale, np.inf)
        self.scale, self.zero = start.scale, start.zero

    def _sums(self, inverse: _Floats, zero: _Floats) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Sums of w r^2, w r d and w d^2."""
        x, w = self.blocks.x, self.blocks.w
        t = x * inverse
        d = _round_even(_clamp(t, -zero, self.blocks.top - zero))
        r = t - d
        wr, wd = (r, d) if w is None else (w * r, w * d)
        return _add_rows(wr * r), _add_rows(wr * d), _add_rows(wd * d)

    def attempt(self, inverse: _Floats, zero: _Floats) -> None:
        """Try the scale 1 / inverse, improved for the codes it gives."""
        rr, rd, dd = self._sums(inverse, zero)
        delta = rd / np.where(dd > 0, dd, _F32(1))
        tried = _F32(1) / inverse
        scale = tried + tried * delta
        if self.blocks.half:
            scale = scale.astype(np.float16).astype(_F32)
            delta = scale * inverse - _F32(1)
        ratio = self.unit / inverse
        error = ratio * ratio * (rr + (delta * delta * dd - _F32(2) * delta * rd))
        better = (error < self.error) & (np.abs(scale) >= _SMALLEST) & np.isfinite(scale)
        self.error = np.where(better, error, self.error)
        self.scale = np.where(better, scale, self.scale)
        self.zero = np.where(better, zero, self.zero)

    def grid(self, low: _Floats, high: _Floats) -> None:
        top, middle, symmetric = self.blocks.top, self.blocks.middle, self.blocks.symmetric
        count, first, step = _GRIDS[self.blocks.bits, symmetric]
        full = middle if symmetric else top
        for i in range(count):
            more = _F32(first + i * step)
            side = _F32(i % 3 - 1) * (more * _F32(0.5))
            inverse = self.unit * ((full + more) / full)
            centre = top * _F32(0.5) - (high * _F32(0.5) + low * _F32(0.5)) * inverse
            zero = np.full_like(centre, middle) if symmetric else _round_even(_clamp(centre + side, _F32(0), top))
            self.attempt(inverse, zero)

    def moves(self) -> None:
        for sign, step in zip(_MOVES_SIGN, _MOVES_ZERO, strict=True):
            if self.blocks.symmetric:
                self.attempt(_F32(sign) / self.scale, self.zero)
            else:
                self.attempt(_F32(1) / self.scale, _clamp(self.zero + _F32(step), _F32(0), self.blocks.top))


def _quantize_columns(blocks: _Blocks, search: bool) -> tuple[_Scales, NDArray[np.uint8]]:
    x, top, middle = blocks.x, blocks.top, blocks.middle
    low, high = np.minimum(x.min(axis=0), _F32(0)), np.maximum(x.max(axis=0), _F32(0))
    if blocks.symmetric:
        wanted = np.where(high > -low, high, low) / -middle
        exact = _stored(wanted, False)
        zero = np.full_like(exact, middle)
    else:
        exact = _stored((high * _F32(0.5) - low * _F32(0.5)) / top * _F32(2), False)
        zero = _round_half_up(_clamp(_F32(0) - low / np.where(exact != 0, exact, _F32(1)), _F32(0), top))
    found = start = _Scales(_stored(exact, blocks.half), zero)
    if search:
        best = _Search(blocks, start, exact)
        best.grid(low, high)
        best.moves()
        after = _exact_error(blocks, _Scales(best.scale, best.zero))
        better = after < _exact_error(blocks, start)
        found = _Scales(np.where(better, best.scale, start.scale), np.where(better, best.zero, start.zero))
    return found, _codes(x, found, top).astype(np.uint8)


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


def _columns(values: _Floats, block_size: int) -> _Floats:
    """[n, k] -> [block_size, n * k_blocks], filled up with zeros."""
    filled = np.pad(values, ((0, 0), (0, -values.shape[1] % block_size)))
    return np.ascontiguousarray(filled.reshape(-1, block_size).T)


def _proportions(weights: _Floats) -> _Floats:
    """Return the weights times a power of two, so that sums do not overflow."""
    exponent = np.frexp(weights.max())[1]
    scaled: _Floats = np.ldexp(weights, -exponent)
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
                    f"row {begin + too_large[0]} needs a scale above 65504, the largest float16; use scales of float32"
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
    d = _unpack(codes, bits, block_size).astype(_F32) - zeros[..., None].astype(_F32)
    with np.errstate(all="ignore"):
        out[:] = (scales[..., None].astype(_F32) * d).reshape(n, k_blocks * block_size)[:, :k]
