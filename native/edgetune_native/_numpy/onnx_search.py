"""The search at 4 bits in integers: the operations of nbits_search.h in the same order, so the bytes are the same."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .onnx_steps import F32, SMALLEST, Floats, add_rows, clamp, inverse_of, round_even

_PEAK = F32(32767)
_STEP = 1024  # codes are rounded from numbers in units of 1 / _STEP
_GRID, _GRID_FIRST, _GRID_STEPS = 9, -1.25, {False: 0.6875, True: 0.71875}
_SIDES, _MOVES, _SIGNS, _ROUNDS = (-1.0, 0.0, 1.0), (-1.0, 0.0, 1.0), (-1.0, 1.0, 0.96875), 2


class IntegerSearch:
    """Blocks x [block_size, blocks], and the best scale and zero point of each block so far."""

    def __init__(self, x: Floats, zero: Floats, unit: Floats, *, symmetric: bool, half: bool) -> None:
        """Start from the rule without search: its zero points, and `unit`, the inverse of its scales (0: no search)."""
        self._x, self._symmetric, self._half = x, symmetric, half
        self._low, self._high = np.minimum(x.min(axis=0), F32(0)), np.maximum(x.max(axis=0), F32(0))
        self._peak = np.maximum(self._high, -self._low)
        factor = _PEAK / np.maximum(self._peak, SMALLEST)
        sought = np.isfinite(factor)
        self._grain = np.where(sought, self._peak / _PEAK, F32(1))
        self._unit = np.where(sought, unit, F32(0))
        self._whole = round_even(x * np.where(sought, factor, F32(0))).astype(np.int64)
        self._gain, self._scale, self._zero = np.zeros_like(zero), np.ones_like(zero), zero

    def best(self, scale: Floats) -> tuple[Floats, Floats]:
        """Return scales and zero points: those found, or those of the rule without search where none is better."""
        before = self._zero
        self._search_grid()
        for _ in range(_ROUNDS):
            self._search_near()
        found = self._scale * self._grain
        if self._half:
            found = found.astype(np.float16).astype(F32)
        error, left = self._error(scale, before), self._error(found, self._zero)
        step = found * self._unit
        slack = (step * step) * F32(len(self._x) * 2.0**-25)
        storable = (np.abs(found) >= SMALLEST) & np.isfinite(found)
        better = (left * F32(1 + 2.0**-12) + slack < error) & np.isfinite(error) & storable
        return np.where(better, found, scale), np.where(better, self._zero, before)

    def _try(self, steps: Floats, zero: Floats) -> None:
        multiplier = round_even(clamp(steps, -_PEAK, _PEAK)).astype(np.int64)
        t = (self._whole * multiplier + (1 << 14)) >> 15
        least = -zero.astype(np.int64)
        d = np.clip((t * (32768 // _STEP) + (1 << 14)) >> 15, least, 15 + least)
        product, square = (self._whole * d).sum(axis=0).astype(F32), (d * d).sum(axis=0).astype(F32)
        scale = product / np.maximum(square, F32(1))
        if self._half:
            scale = (scale * self._grain).astype(np.float16).astype(F32) / self._grain
        gain = scale * ((product + product) - scale * square)
        better = self._gain < gain
        self._gain = np.where(better, gain, self._gain)
        self._scale = np.where(better, scale, self._scale)
        self._zero = np.where(better, zero, self._zero)

    def _search_grid(self) -> None:
        full = F32(8 if self._symmetric else 15)
        whole = self._unit * self._peak * F32(_STEP)
        middle = (self._high * F32(0.5) + self._low * F32(0.5)) * self._unit
        eight = np.full_like(middle, 8)
        for i in range(_GRID):
            more = F32(_GRID_FIRST) + F32(i) * F32(_GRID_STEPS[self._symmetric])
            factor, side = (full + more) / full, F32(_SIDES[i % len(_SIDES)]) * (more * F32(0.5))
            zero = round_even(clamp((F32(7.5) - middle * factor) + side, F32(0), F32(15)))
            self._try(whole * factor, eight if self._symmetric else zero)

    def _search_near(self) -> None:
        steps, zero = inverse_of(self._scale) * F32(32768 * _STEP), self._zero
        for sign, move in zip(_SIGNS, _MOVES, strict=True):
            if self._symmetric:
                self._try(steps * F32(sign), zero)
            else:
                self._try(steps, clamp(zero + F32(move), F32(0), F32(15)))

    def _error(self, scale: Floats, zero: Floats) -> Any:
        inverse, shift = inverse_of(scale), zero + F32(12582912)
        code = clamp(self._x * inverse + shift, F32(12582912), F32(12582912 + 15))
        r: NDArray[Any] = (self._x - scale * (code - shift)) * self._unit
        return add_rows(r * r)
