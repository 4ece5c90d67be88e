"""Blocks of 4- and 8-bit codes, as ONNX Runtime's MatMulNBits and GatherBlockQuantized read them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import _backend
from ._checks import Rows, array, array_of, importance_weights, integer, stored_rows, thread_count
from .results import NBits

__all__ = ["dequantize_blocks", "quantize_blocks"]

_BITS = (4, 8)
_BLOCK_SIZES = (16, 32, 64, 128, 256)
_SCALE_DTYPES = (np.dtype(np.float32), np.dtype(np.float16))


def quantize_blocks(
    rows: Rows,
    bits: int,
    *,
    block_size: int,
    symmetric: bool = True,
    weights: NDArray[np.float32] | None = None,
    search: bool = True,
    scale_dtype: DTypeLike = np.float32,
    threads: int = 0,
) -> NBits:
    """Quantize rows of weights to the blocks that the ONNX operator com.microsoft.MatMulNBits reads.

    Each row is cut into blocks along k. In a block a code q stands for scale * (q - zero point). The layout is that of
    ONNX Runtime (docs/ContribOperators.md, MatMulNBits): the arrays are its inputs B, scales and zero_points.
    GatherBlockQuantized reads the same arrays, `codes` as [n, -1], if k is a multiple of the block size.

    Without `search`, codes and scales are those of ONNX Runtime's own quantizer. Symmetric: the value of largest size
    gets code 0, so a scale may be negative. Otherwise: the range from min(x, 0) to max(x, 0) is spread over all codes.
    With `search`, each block tries 15 scales (4 bits; 12 or 13 with `weights`) or 36 (8 bits), each improved by least
    squares for its codes. It keeps the one with the least sum w (x - scale * (q - zero point))^2, measured with the
    scale as it is stored, and the rule without search where none is better. The error that remains, as a share of the
    error without search, on Gaussian weights (tests/bench/bench_nbits.py has more):

    | block size                         |   16 |   32 |   64 |  128 |  256 |
    |------------------------------------|------|------|------|------|------|
    | 4 bits, symmetric                  | 0.86 | 0.89 | 0.90 | 0.88 | 0.84 |
    | 4 bits, zero points                | 0.85 | 0.90 | 0.91 | 0.89 | 0.85 |
    | 8 bits, symmetric                  | 0.63 | 0.76 | 0.85 | 0.90 | 0.94 |
    | 8 bits, zero points                | 0.58 | 0.73 | 0.83 | 0.90 | 0.94 |
    | 4 bits, symmetric, with importance | 0.56 | 0.62 | 0.67 | 0.68 | 0.69 |

    Args:
        rows: [n, k] float32, float16, or uint16 holding the bits of bfloat16. Not changed. k need not be a multiple of
            the block size: the last block is filled up with codes that stand for 0.
        bits: 4 or 8.
        block_size: weights per block: 16, 32, 64, 128 or 256.
        symmetric: use the zero point 8 (4 bits) or 128 (8 bits), which the operator assumes if that input is absent.
        weights: [k] float32, the importance of each column; finite and not negative. Only their proportions count, and
            only with `search`.
        search: search for the least error; otherwise the range of the block determines the scale.
        scale_dtype: numpy.float32 or numpy.float16, the dtype of the activations.
        threads: number of threads; 0 means one per core. The bytes depend neither on it nor on the instruction set.

    Returns:
        `NBits`: codes, scales and zero points. A block whose scale would be below the smallest normal float32
        (1.2e-38), or would round to 0 in float16 (below 3e-8), is stored as zeros with scale 0.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong value or shape, a row has a NaN or an infinity, or a block needs a scale
            that float16 cannot hold.
    """
    source, dtype = stored_rows(rows)
    n, k = source.shape
    if k == 0:
        raise ValueError(f"rows has shape {source.shape}: there is nothing to quantize in a row")
    width, size = _one_of(bits, "bits", _BITS), _one_of(block_size, "block_size", _BLOCK_SIZES)
    importance = importance_weights(weights, k)
    searching, count = _flag(search, "search"), thread_count(threads)
    result = _new_blocks(n, k, width, size, _flag(symmetric, "symmetric"), _scale_dtype(scale_dtype))
    without_zeros, half = result.zero_points is None, result.scales.dtype == np.float16
    _backend.kernels.quantize_blocks(
        source, dtype, n, k, importance, width, size, without_zeros, searching, half, *result, count
    )
    return result


def _new_blocks(n: int, k: int, bits: int, block_size: int, symmetric: bool, scale_dtype: np.dtype[Any]) -> NBits:
    k_blocks = -(-k // block_size)
    return NBits(
        np.empty((n, k_blocks, block_size * bits // 8), np.uint8),
        np.empty((n, k_blocks), scale_dtype),
        None if symmetric else np.empty((n, -(-k_blocks * bits // 8)), np.uint8),
    )


def dequantize_blocks(
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32] | NDArray[np.float16],
    zero_points: NDArray[np.uint8] | None = None,
    *,
    bits: int,
    block_size: int,
    k: int,
    threads: int = 0,
) -> NDArray[np.float32]:
    """Dequantize blocks: scale * (q - zero point), in float32, as ONNX Runtime does.

    Args:
        codes: [n, k_blocks, block_size * bits // 8] uint8, as `quantize_blocks` returns them.
        scales: [n, k_blocks] float32 or float16.
        zero_points: [n, ceil(k_blocks * bits / 8)] uint8; None means 8 (4 bits) or 128 (8 bits) throughout.
        bits: 4 or 8.
        block_size: weights per block.
        k: weights per row; k_blocks = ceil(k / block_size).
        threads: number of threads; 0 means one per core.

    Returns:
        [n, k] float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong value or shape.
    """
    width, size = _one_of(bits, "bits", _BITS), _one_of(block_size, "block_size", _BLOCK_SIZES)
    length = integer(k, "k")
    if length <= 0:
        raise ValueError(f"k is {k}, expected a positive number")
    k_blocks = -(-length // size)
    stored = array(codes, "codes", np.dtype(np.uint8), (None, k_blocks, size * width // 8))
    n = stored.shape[0]
    steps = array_of(scales, "scales", _SCALE_DTYPES, "float32 or float16", (n, k_blocks))
    zeros = None
    if zero_points is not None:
        zeros = array(zero_points, "zero_points", np.dtype(np.uint8), (n, -(-k_blocks * width // 8)))
    out = np.empty((n, length), np.float32)
    half, count = steps.dtype == np.float16, thread_count(threads)
    _backend.kernels.dequantize_blocks(stored, steps, half, zeros, width, size, n, length, out, count)
    return out


def _one_of(value: object, name: str, allowed: tuple[int, ...]) -> int:
    number = integer(value, name)
    if number not in allowed:
        raise ValueError(f"{name} is {number}, expected one of {', '.join(map(str, allowed))}")
    return number


def _flag(value: object, name: str) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be a bool, not {type(value).__name__}")
    return bool(value)


def _scale_dtype(value: DTypeLike) -> np.dtype[Any]:
    dtype = np.dtype(value)
    if dtype not in _SCALE_DTYPES:
        raise TypeError(f"scale_dtype is {dtype}, expected float32 or float16")
    return dtype
