"""Two ways to store distributions over the vocabulary, each with its own comparison.

`FullVocabulary` keeps every log-probability in 16 bits (2 V bytes per token). `TopK` keeps the k most
likely tokens exactly and the others as one bucket (8 k bytes per token). Merging the others can only lower a KL
divergence (data processing inequality), so the result is a lower bound, and is labeled so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

import edgetune_native

# Code 0 stands for every probability below exp(-16). Read literally it gives a confident model of 4096 tokens a false
# tail of 4e-4; left out, as in llama-perplexity, the error is below 1.2e-7 per token.
_NEGLIGIBLE = np.float32(-16.0)

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Columns = dict[str, NDArray[Any]]
"""Arrays by name, each with one row per scored token."""


@dataclass(frozen=True)
class StoredComparison:
    """Two models compared at the same m tokens."""

    kld: F64
    """KL(stored || other) in nats."""
    top: I64
    """The other model's most likely token."""
    nll: F64
    """The other model's negative log-likelihood of the token of the text, in nats."""


class Codec(Protocol):
    """A storage format of log-probabilities."""

    name: ClassVar[str]
    is_lower_bound: ClassVar[bool]

    def encode(self, logits: F32) -> Columns:
        """Encode logits [m, V] as columns of m rows."""

    def compare(self, stored: Mapping[str, NDArray[Any]], logits: F32, targets: I64, threads: int) -> StoredComparison:
        """Compare stored columns (m rows) with another model's logits [m, V]; targets [m]."""

    def most_likely(self, stored: Mapping[str, NDArray[Any]], count: int) -> tuple[I64, F64]:
        """Return the `count` most likely tokens, largest first, and their log-probabilities: [m, count] each."""


class FullVocabulary:
    """Every log-probability in a 16-bit code, as in llama.cpp's --kl-divergence-base files."""

    name: ClassVar[str] = "u16"
    is_lower_bound: ClassVar[bool] = False

    def encode(self, logits: F32) -> Columns:
        """Return scale f32[m], min_log_prob f32[m], codes u16[m, V]."""
        scale, min_log_prob, codes = edgetune_native.encode_log_probs(logits)
        return {"scale": scale, "min_log_prob": min_log_prob, "codes": codes}

    def decode(self, stored: Mapping[str, NDArray[Any]], threads: int = 0) -> F32:
        """Return log-probabilities f32[m, V]."""
        columns = (np.ascontiguousarray(stored[name]) for name in ("scale", "min_log_prob", "codes"))
        return edgetune_native.decode_log_probs(*columns, threads=threads)

    def compare(self, stored: Mapping[str, NDArray[Any]], logits: F32, targets: I64, threads: int) -> StoredComparison:
        """Compare over the full vocabulary."""
        decoded = self.decode(stored, threads)
        leave_out_negligible(decoded)
        result = edgetune_native.compare(decoded, logits, targets, threads=threads)
        return StoredComparison(result.kld, logits.argmax(axis=1), result.nll)

    def most_likely(self, stored: Mapping[str, NDArray[Any]], count: int) -> tuple[I64, F64]:
        """Return the most likely tokens of the full vocabulary."""
        return largest(self.decode(stored), count)


@dataclass(frozen=True)
class TopK:
    """The k most likely tokens, and the rest as one bucket."""

    k: int
    name: ClassVar[str] = "top_k"
    is_lower_bound: ClassVar[bool] = True

    def encode(self, logits: F32) -> Columns:
        """Return ids i32[m, k], log_probs f32[m, k], rest f32[m] (log-probability of all others; -inf for none)."""
        k = min(self.k, logits.shape[1])
        ids = np.sort(np.argpartition(logits, -k, axis=1)[:, -k:], axis=1).astype(np.int32)
        log_probs, rest, _ = _bucketed(logits, ids)
        return {"ids": ids, "log_probs": log_probs.astype(np.float32), "rest": rest.astype(np.float32)}

    def compare(self, stored: Mapping[str, NDArray[Any]], logits: F32, targets: I64, threads: int) -> StoredComparison:
        """Compare over k + 1 events."""
        log_probs, rest, log_total = _bucketed(logits, np.asarray(stored["ids"]))
        kept, others = (np.asarray(stored[name], np.float64) for name in ("log_probs", "rest"))
        kld = _divergence(kept, log_probs).sum(axis=1) + _divergence(others, rest)
        nll = log_total - np.take_along_axis(logits, targets[:, None], axis=1)[:, 0].astype(np.float64)
        return StoredComparison(np.maximum(kld, 0.0), logits.argmax(axis=1), nll)

    def most_likely(self, stored: Mapping[str, NDArray[Any]], count: int) -> tuple[I64, F64]:
        """Return the most likely tokens of the k stored ones."""
        order, log_probs = largest(np.asarray(stored["log_probs"]), count)
        return np.take_along_axis(np.asarray(stored["ids"]), order, axis=1).astype(np.int64), log_probs


def largest(values: F32, count: int) -> tuple[I64, F64]:
    """Return indices and values of the `count` largest entries per row of [m, n], largest first: [m, min(count, n)]."""
    count = min(count, values.shape[1])
    found = np.argpartition(values, -count, axis=1)[:, -count:]
    kept = np.take_along_axis(values, found, axis=1)
    order = np.argsort(-kept, axis=1, kind="stable")
    return np.take_along_axis(found, order, axis=1), np.take_along_axis(kept, order, axis=1).astype(np.float64)


def leave_out_negligible(log_probs: F32) -> None:
    """Set log-probabilities below the range of the 16-bit codes to -inf, in place.

    A division by 0 or 1 does it: an assignment through a mask takes NumPy seven times as long.
    """
    with np.errstate(divide="ignore"):
        np.divide(log_probs, log_probs > _NEGLIGIBLE, out=log_probs)


def _divergence(reference: F64, other: F64) -> F64:
    """Return p (log p - log q) where p > 0, else 0."""
    difference = np.subtract(reference, other, where=reference > -np.inf, out=np.zeros_like(reference))
    return np.asarray(np.exp(reference) * difference, np.float64)


def _bucketed(logits: F32, ids: NDArray[np.int32]) -> tuple[F64, F64, F64]:
    """Return the log-probabilities of ids [m, k] and of all others together [m], and the log normalizer [m]."""
    peak = logits.max(axis=1, keepdims=True)
    mass = np.exp(logits - peak)  # f32 [m, V], the only temporary of that size
    total = mass.sum(axis=1, dtype=np.float64)
    np.put_along_axis(mass, ids.astype(np.int64), 0.0, axis=1)
    left = mass.sum(axis=1, dtype=np.float64)
    log_total = np.log(total) + peak[:, 0].astype(np.float64)
    kept = np.take_along_axis(logits, ids.astype(np.int64), axis=1).astype(np.float64) - log_total[:, None]
    rest = np.log(left / total, where=left > 0, out=np.full_like(left, -np.inf))
    return kept, rest, log_total
