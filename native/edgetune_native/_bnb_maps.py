"""The tables of bitsandbytes: the values of its 4-bit and 8-bit codes.

They are those of bitsandbytes 0.50 (`get_4bit_type`, `create_dynamic_map`, `build_quantize_lut`); the tests compare
them with the installed library.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

QUANT_TYPES = ("nf4", "fp4")

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # twelfths; the other eight are their negatives

NEAREST_STEPS = 65536


@functools.cache
def four_bit_map(quant_type: str) -> NDArray[np.float32]:
    """Return the values of the 16 codes, [16] float32 from -1 to 1."""
    if quant_type == "nf4":
        return np.array(_NF4, np.float32)
    half = np.array(_FP4, np.float32) / np.float32(12)
    return np.concatenate([half, np.float32(0) - half])


@functools.cache
def dynamic_map() -> NDArray[np.float32]:
    """Return the 8-bit dynamic map, [256] float32, ascending from about -0.993 to 1.

    It has 0, 1 and seven decades of both signs, each with twice the values of the one below: the midpoints of equal
    parts of 0.1 .. 1. The parts are those of `torch.linspace` where it fuses the product and the sum (x86-64 with
    AVX2): start + step * i in the lower half, end - step * i in the upper. Without fusing, some values differ by up to
    2 ulp.
    """
    values = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    first, last = np.float32(0.1), np.float32(1)
    for decade in range(7):
        parts = 2**decade
        step = np.float64((last - first) / np.float32(parts))
        i = np.arange(parts + 1, dtype=np.float64)  # in double the product is exact: one rounding, as in a fused sum
        edges = np.where(i < (parts + 1) // 2, first + step * i, last - step * (parts - i)).astype(np.float32)
        middles = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (decade - 6))
        values += [middles, -middles]
    table: NDArray[np.float32] = np.sort(np.concatenate(values))
    return table


def nearest_codes(table: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the code of a 256-entry map for each of 65536 steps from -1 to 1, [65536] uint8.

    A code is the number of midpoints of neighboring values below the step. Near 0, where the map is finer than the
    steps, that is not the nearest code; the CUDA kernel of bitsandbytes searches the map itself and differs there.
    """
    midpoints = np.float32(0.5) * (table[:-1] + table[1:])
    twice = 2 * np.arange(NEAREST_STEPS, dtype=np.float32)
    steps = np.float32(-1) + twice / np.float32(NEAREST_STEPS - 1)
    return np.searchsorted(midpoints, steps, side="left").astype(np.uint8)


@functools.cache
def nearest_dynamic_codes() -> NDArray[np.uint8]:
    """Return `nearest_codes(dynamic_map())`, computed once."""
    return nearest_codes(dynamic_map())
