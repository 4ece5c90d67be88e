"""Comparison of logits and 16-bit codes of log-probabilities, from their formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune_native._kernels import Buffer

from ._floats import widen

__all__ = ["compare", "decode_log_probs", "encode_log_probs"]


def _check_logits(rows: Buffer) -> None:
    """Raise ValueError for the first row that is not a distribution."""
    top = rows.max(axis=1)  # NaN if the row has one
    for row in np.flatnonzero(~np.isfinite(top)):
        if top[row] == -np.inf:
            raise ValueError(f"row {row} has no finite logit, so it is not a distribution")
        raise ValueError(f"row {row} contains NaN or +inf, not a valid logit")


def _shifted(rows: Buffer) -> NDArray[np.float64]:
    wide = rows.astype(np.float64)
    shifted: NDArray[np.float64] = wide - wide.max(axis=1, keepdims=True)
    return shifted


def _mass(shifted: NDArray[Any]) -> NDArray[np.float64]:
    mass: NDArray[np.float64] = np.where(shifted > -708.0, np.exp(np.maximum(shifted, -708.0)), 0.0)
    return mass


def _divergence(p: Buffer, log_p: Buffer, log_q: Buffer) -> NDArray[np.float64]:
    """Return KL(p || q) of each row, from the definition."""
    some = p > 0.0
    difference = np.subtract(log_p, log_q, out=np.zeros_like(p), where=some)
    kld: NDArray[np.float64] = np.multiply(p, difference, out=difference, where=some).sum(axis=1)
    kld[(np.isfinite(log_p) & (log_q == -np.inf)).any(axis=1)] = np.inf
    return np.maximum(kld, 0.0)


def _entropy(p: Buffer, log_p: Buffer) -> NDArray[np.float64]:
    some = p > 0.0
    total: NDArray[np.float64] = np.multiply(p, log_p, out=np.zeros_like(p), where=some).sum(axis=1)
    return np.maximum(-total, 0.0)


def _largest(rows: Buffer, k: int) -> NDArray[np.bool_]:
    """Return [n, v], whether a value is among the k largest of its row; of equal values the lowest indices count."""
    v = rows.shape[1]
    edge = np.partition(rows, v - k, axis=1)[:, v - k, None]
    above, at_edge = rows > edge, rows == edge
    room = k - above.sum(axis=1, keepdims=True)
    chosen: NDArray[np.bool_] = above | (at_edge & (at_edge.cumsum(axis=1) <= room))
    return chosen


def compare(
    reference: Buffer,
    reference_dtype: int,
    other: Buffer,
    other_dtype: int,
    targets: Buffer,
    n: int,
    v: int,
    top_k: int,
    outputs: tuple[Buffer, ...],
    threads: int,
    /,
) -> None:
    """reference[n, v], other[n, v], targets[n] i64 -> the fields of `Comparison` in order, f64[n], same_top u8[n]."""
    if n == 0:
        return
    kld, same_top, nll_reference, nll, reverse_kld, entropy_reference, entropy, top_k_overlap = outputs
    a, b = widen(reference, reference_dtype), widen(other, other_dtype)
    _check_logits(a)
    _check_logits(b)
    log_p, log_q = _shifted(a), _shifted(b)
    p, q = _mass(log_p), _mass(log_q)
    for mass, logs in ((p, log_p), (q, log_q)):
        total = mass.sum(axis=1, keepdims=True)
        mass /= total
        logs -= np.log(total)
    rows = np.arange(n)
    kld[...] = _divergence(p, log_p, log_q)
    same_top[...] = a.argmax(axis=1) == b.argmax(axis=1)
    nll_reference[...] = -log_p[rows, targets]
    nll[...] = -log_q[rows, targets]
    reverse_kld[...] = _divergence(q, log_q, log_p)
    entropy_reference[...] = _entropy(p, log_p)
    entropy[...] = _entropy(q, log_q)
    top_k_overlap[...] = (_largest(a, top_k) & _largest(b, top_k)).sum(axis=1) / top_k


def encode_log_probs(
    logits: Buffer, dtype: int, n: int, v: int, scale: Buffer, min_log_prob: Buffer, codes: Buffer, threads: int, /
) -> None:
    """logits[n, v] -> scale[n], min_log_prob[n] f32, codes[n, v] u16."""
    if n == 0:
        return
    logits = widen(logits, dtype)
    _check_logits(logits)
    top = logits.max(axis=1, keepdims=True)
    low = np.maximum(logits.min(axis=1, keepdims=True), top - np.float32(16))
    terms = _mass((logits - top).astype(np.float64)).astype(np.float32)
    log_sum = np.log(terms.sum(axis=1, dtype=np.float64, keepdims=True)).astype(np.float32)
    step = (top - low) / np.float32(65535)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / step
    usable = np.isfinite(inverse)
    inverse = np.where(usable, inverse, np.float32(0))
    above = np.where(logits > low, logits - low, np.float32(0))
    codes[...] = np.rint(inverse * above).astype(np.uint16)
    scale[...] = np.where(usable, step, np.float32(0))[:, 0]
    min_log_prob[...] = (low - top - log_sum)[:, 0]


def decode_log_probs(
    scale: Buffer, min_log_prob: Buffer, codes: Buffer, n: int, v: int, out: Buffer, threads: int, /
) -> None:
    """scale[n], min_log_prob[n] f32, codes[n, v] u16 -> out[n, v] f32."""
    np.multiply(scale[:, None], codes.astype(np.float32), out=out)
    np.add(out, min_log_prob[:, None], out=out)
