"""Comparison of two models' logits, and log-probabilities in 16 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _backend
from ._checks import F32, Rows, array, array_of, integer, stored_rows, thread_count
from .results import Comparison, LogProbCodes

__all__ = ["compare", "decode_log_probs", "encode_log_probs"]


def compare(
    reference: Rows,
    other: Rows,
    targets: NDArray[np.int32] | NDArray[np.int64],
    *,
    top_k: int = 10,
    threads: int = 0,
) -> Comparison:
    """Compare two models' outputs, row by row.

    The function takes the log-softmax itself, so a row may be logits or log-probabilities. -inf is allowed: such an
    entry has probability 0, and makes a divergence +inf where the other row has a finite logit. Probabilities below
    exp(-87) times about the largest of their row count as 0. Differences above 1e19 nats count as 1e19.

    Args:
        reference: [n, v] float32, float16, or uint16 holding the bits of bfloat16.
        other: [n, v], likewise; its dtype may be another.
        targets: [n] int32 or int64, the token that came next, 0 to v - 1.
        top_k: how many of the largest logits `top_k_overlap` compares, 1 or more; values above v mean v.
        threads: number of threads; 0 means one per core. The numbers do not depend on it.

    Returns:
        A `Comparison` of arrays of length n, in nats. The error of `nll_reference` and `nll` is below 4e-6 and usually
        1e-7. The error of the divergences is about 1e-6 of their value, however small they are, because the formula has
        no cancellation (the bounds are derived in native/src/compare_kernel.c). Equal rows give exactly 0.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong value or shape, or a row has a NaN, +inf or no finite logit.
    """
    a, a_dtype = _logits(reference, "reference")
    n, v = a.shape
    b, b_dtype = _logits(other, "other", (n, v))
    ids = _target_ids(targets, n, v)
    k = integer(top_k, "top_k")
    if k < 1:
        raise ValueError(f"top_k is {k}, expected 1 or more")
    kld, nll_reference, nll, reverse_kld, entropy_reference, entropy, overlap = (np.empty(n) for _ in range(7))
    same_top = np.empty(n, np.bool_)
    result = Comparison(kld, same_top, nll_reference, nll, reverse_kld, entropy_reference, entropy, overlap)
    outputs = tuple(part.view(np.uint8) if part is same_top else part for part in result)
    _backend.kernels.compare(a, a_dtype, b, b_dtype, ids, n, v, min(k, v), outputs, thread_count(threads))
    return result


def encode_log_probs(logits: Rows, *, threads: int = 0) -> LogProbCodes:
    """Encode rows of log-probabilities in 16 bits, as llama.cpp's `--kl-divergence-base` file does.

    Args:
        logits: [n, v] float32, float16, or uint16 holding the bits of bfloat16: logits or log-probabilities, -inf
            allowed.
        threads: number of threads; 0 means one per core. The bits do not depend on it.

    Returns:
        `LogProbCodes`: scale [n], min_log_prob [n], codes [n, v]. An entry more than 16 nats below the largest of its
        row is stored as 16 nats below it.

    Raises:
        TypeError: `logits` has the wrong type or dtype.
        ValueError: `logits` has the wrong shape, or a row has a NaN, +inf or no finite logit.
    """
    rows, dtype = _logits(logits, "logits")
    n, v = rows.shape
    result = LogProbCodes(np.empty(n, np.float32), np.empty(n, np.float32), np.empty((n, v), np.uint16))
    _backend.kernels.encode_log_probs(rows, dtype, n, v, *result, thread_count(threads))
    return result


def decode_log_probs(
    scale: NDArray[np.float32], min_log_prob: NDArray[np.float32], codes: NDArray[np.uint16], *, threads: int = 0
) -> NDArray[np.float32]:
    """Decode rows that `encode_log_probs` encoded.

    Args:
        scale: [n] float32, nats per step.
        min_log_prob: [n] float32, the log-probability of code 0.
        codes: [n, v] uint16.
        threads: number of threads; 0 means one per core.

    Returns:
        [n, v] float32 log-probabilities.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape.
    """
    stored = array(codes, "codes", np.dtype(np.uint16), (None, None))
    n, v = stored.shape
    steps = array(scale, "scale", F32, (n,))
    low = array(min_log_prob, "min_log_prob", F32, (n,))
    out = np.empty((n, v), np.float32)
    _backend.kernels.decode_log_probs(steps, low, stored, n, v, out, thread_count(threads))
    return out


def _logits(value: object, name: str, shape: tuple[int | None, int | None] = (None, None)) -> tuple[NDArray[Any], int]:
    checked, dtype = stored_rows(value, name, shape)
    if checked.shape[1] == 0:
        raise ValueError(f"{name} has shape {checked.shape}: the vocabulary is empty")
    return checked, dtype


def _target_ids(targets: object, n: int, v: int) -> NDArray[np.int64]:
    dtypes = (np.dtype(np.int32), np.dtype(np.int64))
    ids = np.ascontiguousarray(array_of(targets, "targets", dtypes, "int32 or int64", (n,)), np.int64)
    outside = np.flatnonzero((ids < 0) | (ids >= v))
    if outside.size:
        raise ValueError(f"targets[{outside[0]}] is {ids[outside[0]]}, expected 0 to {v - 1}")
    return ids
