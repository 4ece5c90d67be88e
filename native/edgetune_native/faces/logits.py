"""Comparison of two models' logits, and their storage in 16 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune_native import _kernels
from edgetune_native.results import Comparison, LogProbCodes

from .checks import array, thread_count


def _target_ids(targets: object, n: int, v: int) -> NDArray[np.int64]:
    if not isinstance(targets, np.ndarray) or targets.dtype not in (np.dtype(np.int32), np.dtype(np.int64)):
        found = f"dtype {targets.dtype}" if isinstance(targets, np.ndarray) else f"type {type(targets).__name__}"
        raise TypeError(f"targets has {found}, expected a numpy array of int32 or int64")
    ids = np.ascontiguousarray(array(targets, "targets", None, (n,)), np.int64)
    outside = np.flatnonzero((ids < 0) | (ids >= v))
    if outside.size:
        raise ValueError(f"targets[{outside[0]}] is {ids[outside[0]]}, expected 0 to {v - 1}")
    return ids


_DTYPES = {
    np.dtype(np.float32): _kernels.F32,
    np.dtype(np.float16): _kernels.F16,
    np.dtype(np.uint16): _kernels.BF16,
}

Logits = NDArray[np.float32] | NDArray[np.float16] | NDArray[np.uint16]
"""float32, float16, or uint16 holding the bits of bfloat16."""


def _logits(value: object, name: str, shape: tuple[int | None, int | None] = (None, None)) -> tuple[NDArray[Any], int]:
    """Return the array and its element type as the kernels count them."""
    if not isinstance(value, np.ndarray) or value.dtype not in _DTYPES:
        found = f"dtype {value.dtype}" if isinstance(value, np.ndarray) else f"type {type(value).__name__}"
        raise TypeError(f"{name} has {found}, expected a numpy array of float32, float16 or uint16 (bfloat16 bits)")
    checked = array(value, name, None, shape)
    if checked.shape[1] == 0:
        raise ValueError(f"{name} has shape {checked.shape}: the vocabulary is empty")
    return checked, _DTYPES[checked.dtype]


def _top_k(k: object, v: int) -> int:
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)):
        raise TypeError(f"top_k must be an int, not {type(k).__name__}")
    if k < 1:
        raise ValueError(f"top_k is {k}, expected 1 or more")
    return min(int(k), v)


class LogitsFace:
    """Logits kernels."""

    _kernels: _kernels.Kernels

    def compare(
        self,
        reference: Logits,
        other: Logits,
        targets: NDArray[np.int32] | NDArray[np.int64],
        *,
        top_k: int = 10,
        threads: int = 0,
    ) -> Comparison:
        """Compare two models' outputs, row by row.

        Log-softmax is applied inside, so a row may be logits or log-probabilities. -inf is allowed: it has no mass, and
        makes a divergence +inf where the other row has a finite logit. Probabilities below exp(-87) times about the
        largest of their row count as none, and a difference of more than 1e19 nats as that.

        Args:
            reference: [n, v] float32, float16, or uint16 holding the bits of bfloat16.
            other: [n, v], likewise; its type may be another.
            targets: [n] int32 or int64, the token that came next, 0 to v - 1.
            top_k: how many of the largest logits `top_k_overlap` looks at, 1 or more; above v it is v.
            threads: how many threads; 0 is one per core. The numbers do not depend on it.

        Returns:
            A `Comparison` of arrays of length n, in nats. The error of `nll_reference` and `nll` is below some 4e-6,
            usually 1e-7; that of the divergences some 1e-6 of their value, however small they are, because the formula
            has no cancellation. (The bounds: native/src/compare_kernel.h.) Equal rows give exactly 0.

        Raises:
            TypeError, ValueError: an argument is not as described, or a row holds a NaN or +inf or no finite logit.
        """
        a, a_dtype = _logits(reference, "reference")
        n, v = a.shape
        b, b_dtype = _logits(other, "other", (n, v))
        ids = _target_ids(targets, n, v)
        k = _top_k(top_k, v)
        kld, nll_reference, nll, reverse_kld, entropy_reference, entropy, overlap = (np.empty(n) for _ in range(7))
        same_top = np.empty(n, np.bool_)
        result = Comparison(kld, same_top, nll_reference, nll, reverse_kld, entropy_reference, entropy, overlap)
        outputs = tuple(part.view(np.uint8) if part is same_top else part for part in result)
        self._kernels.compare(a, a_dtype, b, b_dtype, ids, n, v, k, outputs, thread_count(threads))
        return result

    def encode_log_probs(self, logits: Logits, *, threads: int = 0) -> LogProbCodes:
        """Store rows of log-probabilities in 16 bits, as llama.cpp's `--kl-divergence-base` file does.

        Args:
            logits: [n, v] float32, float16, or uint16 holding the bits of bfloat16: logits or log-probabilities, with
                -inf allowed.
            threads: how many threads; 0 is one per core. The bits do not depend on it.

        Returns:
            `LogProbCodes`: scale [n], min_log_prob [n], codes [n, v]. What is more than 16 nats below the largest is
            stored as exactly 16 nats below.

        Raises:
            TypeError, ValueError: not as described, or a row holds a NaN or +inf or no finite logit.
        """
        rows, dtype = _logits(logits, "logits")
        n, v = rows.shape
        result = LogProbCodes(np.empty(n, np.float32), np.empty(n, np.float32), np.empty((n, v), np.uint16))
        self._kernels.encode_log_probs(rows, dtype, n, v, *result, thread_count(threads))
        return result

    def decode_log_probs(
        self,
        scale: NDArray[np.float32],
        min_log_prob: NDArray[np.float32],
        codes: NDArray[np.uint16],
        *,
        threads: int = 0,
    ) -> NDArray[np.float32]:
        """Return log-probabilities [n, v] float32 of rows that `encode_log_probs` stored.

        Args:
            scale: [n] float32, nats per step.
            min_log_prob: [n] float32, what code 0 stands for.
            codes: [n, v] uint16.
            threads: how many threads; 0 is one per core.

        Raises:
            TypeError, ValueError: an argument is not as described.
        """
        stored = array(codes, "codes", np.dtype(np.uint16), (None, None))
        n, v = stored.shape
        steps = array(scale, "scale", np.dtype(np.float32), (n,))
        low = array(min_log_prob, "min_log_prob", np.dtype(np.float32), (n,))
        out = np.empty((n, v), np.float32)
        self._kernels.decode_log_probs(steps, low, stored, n, v, out, thread_count(threads))
        return out
