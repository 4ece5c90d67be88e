"""Rows of weights to the blocks of ONNX Runtime's MatMulNBits and back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edgetune_native import _kernels
from edgetune_native.results import NBits

from .checks import array, stored_rows, thread_count

_BITS = (4, 8)
_BLOCK_SIZES = (16, 32, 64, 128, 256)
_SCALE_DTYPES = (np.dtype(np.float32), np.dtype(np.float16))


def _one_of(value: object, name: str, allowed: tuple[int, ...]) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if value not in allowed:
        raise ValueError(f"{name} is {value}, expected one of {', '.join(map(str, allowed))}")
    return int(value)


def _flag(value: object, name: str) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be a bool, not {type(value).__name__}")
    return bool(value)


def _scale_dtype(value: DTypeLike) -> np.dtype[Any]:
    dtype = np.dtype(value)
    if dtype not in _SCALE_DTYPES:
        raise TypeError(f"scale_dtype is {dtype}, expected float32 or float16")
    return dtype


def _importance(weights: object, k: int) -> NDArray[np.float32] | None:
    if weights is None:
        return None
    checked: NDArray[np.float32] = array(weights, "weights", np.dtype(np.float32), (k,))
    wrong = np.flatnonzero(~(np.isfinite(checked) & (checked >= 0)))
    if wrong.size:
        raise ValueError(f"weights[{wrong[0]}] is {checked[wrong[0]]}, expected a finite number not below 0")
    return checked


class NBitsFace:
    """Block quantization to 4 and 8 bits."""

    _kernels: _kernels.Kernels

    def quantize_blocks(
        self,
        rows: NDArray[np.float32] | NDArray[np.float16] | NDArray[np.uint16],
        bits: int,
        *,
        block_size: int,
        symmetric: bool = True,
        weights: NDArray[np.float32] | None = None,
        search: bool = True,
        scale_dtype: DTypeLike = np.float32,
        threads: int = 0,
    ) -> NBits:
        """Quantize rows of weights into the blocks that the ONNX operator com.microsoft.MatMulNBits reads.

        Each row is cut into blocks along k; in a block a code q stands for scale * (q - zero point). The layout is that
        of ONNX Runtime (docs/ContribOperators.md, MatMulNBits), whose inputs B, scales and zero_points are the arrays
        as they are. GatherBlockQuantized reads the same arrays, `codes` as [n, -1], if k is a whole number of blocks.

        Without `search` codes and scales are those of ONNX Runtime's own quantizer: symmetric, the value of largest
        size becomes code 0 (so a scale may be negative); otherwise the range from min(x, 0) to max(x, 0) is spread over
        all codes. With `search` each block takes, of 15 (4 bits; 12 or 13 with `weights`) or 36 (8 bits) trials, each
        improved by least squares for its codes, the one of least sum w (x - scale * (q - zero point))^2, measured with
        the scale as it is stored; that of the rule without search stays if none is better. What is left of that rule's
        error, on Gaussian weights (tests/bench/bench_nbits.py has more):

        | block size                         |   16 |   32 |   64 |  128 |  256 |
        |------------------------------------|------|------|------|------|------|
        | 4 bits, symmetric                  | 0.86 | 0.89 | 0.90 | 0.88 | 0.84 |
        | 4 bits, zero points                | 0.85 | 0.90 | 0.91 | 0.89 | 0.85 |
        | 8 bits, symmetric                  | 0.63 | 0.76 | 0.85 | 0.90 | 0.94 |
        | 8 bits, zero points                | 0.58 | 0.73 | 0.83 | 0.90 | 0.94 |
        | 4 bits, symmetric, with importance | 0.56 | 0.62 | 0.67 | 0.68 | 0.69 |

        Args:
            rows: [n, k], float32, float16, or uint16 holding the bits of bfloat16. Not changed. k need not be a
                multiple of the block size: the last block is filled up with codes that stand for 0.
            bits: 4 or 8.
            block_size: weights per block: 16, 32, 64, 128 or 256.
            symmetric: the zero point is 8 (4 bits) or 128 (8 bits), as the operator takes it without that input.
            weights: [k] float32, the importance of each column; finite and not negative. Only proportions matter, and
                only to the search.
            search: for the least error; otherwise the range of the block decides.
            scale_dtype: numpy.float32 or numpy.float16, the type of the activations.
            threads: how many threads; 0 is one per core. The bytes do not depend on it, nor on the instruction set.

        Returns:
            `NBits`: codes, scales and zero points. A block whose scale would be below the smallest normal float32
            (1.2e-38) or round to 0 in float16 (below 3e-8) is stored as zeros, with scale 0.

        Raises:
            TypeError, ValueError: an argument is not as described, a row holds a NaN or an infinity, or a block needs a
                scale that float16 cannot hold.
        """
        source, kind = stored_rows(rows)
        n, k = source.shape
        if k == 0:
            raise ValueError(f"rows has shape {source.shape}: there is nothing to quantize in a row")
        width, size = _one_of(bits, "bits", _BITS), _one_of(block_size, "block_size", _BLOCK_SIZES)
        even, searching = _flag(symmetric, "symmetric"), _flag(search, "search")
        dtype = _scale_dtype(scale_dtype)
        importance = _importance(weights, k)
        count = thread_count(threads)
        k_blocks = -(-k // size)
        result = NBits(
            np.empty((n, k_blocks, size * width // 8), np.uint8),
            np.empty((n, k_blocks), dtype),
            None if even else np.empty((n, -(-k_blocks * width // 8)), np.uint8),
        )
        half = dtype == np.float16
        self._kernels.quantize_blocks(
            source, kind, n, k, importance, width, size, even, searching, half, *result, count
        )
        return result

    def dequantize_blocks(
        self,
        codes: NDArray[np.uint8],
        scales: NDArray[np.float32] | NDArray[np.float16],
        zero_points: NDArray[np.uint8] | None = None,
        *,
        bits: int,
        block_size: int,
        k: int,
        threads: int = 0,
    ) -> NDArray[np.float32]:
        """Turn blocks back into weights: scale * (q - zero point), in float32, as ONNX Runtime does.

        Args:
            codes: [n, k_blocks, block_size * bits // 8] uint8, as `quantize_blocks` gives them.
            scales: [n, k_blocks] float32 or float16.
            zero_points: [n, ceil(k_blocks * bits / 8)] uint8; None: 8 (4 bits) or 128 (8 bits) throughout.
            bits: 4 or 8.
            block_size: weights per block.
            k: weights per row; k_blocks = ceil(k / block_size).
            threads: how many threads; 0 is one per core.

        Returns:
            [n, k] float32.

        Raises:
            TypeError, ValueError: an argument is not as described.
        """
        width, size = _one_of(bits, "bits", _BITS), _one_of(block_size, "block_size", _BLOCK_SIZES)
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)):
            raise TypeError(f"k must be an int, not {type(k).__name__}")
        if k <= 0:
            raise ValueError(f"k is {k}, expected a positive number")
        k_blocks = -(-int(k) // size)
        stored = array(codes, "codes", np.dtype(np.uint8), (None, k_blocks, size * width // 8))
        n = stored.shape[0]
        if not isinstance(scales, np.ndarray) or scales.dtype not in _SCALE_DTYPES:
            found = f"dtype {scales.dtype}" if isinstance(scales, np.ndarray) else f"type {type(scales).__name__}"
            raise TypeError(f"scales has {found}, expected a numpy array of float32 or float16")
        steps = array(scales, "scales", None, (n, k_blocks))
        zeros = None
        if zero_points is not None:
            zeros = array(zero_points, "zero_points", np.dtype(np.uint8), (n, -(-k_blocks * width // 8)))
        out = np.empty((n, k), np.float32)
        half, count = steps.dtype == np.float16, thread_count(threads)
        self._kernels.dequantize_blocks(stored, steps, half, zeros, width, size, n, int(k), out, count)
        return out
