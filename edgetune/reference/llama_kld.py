"""Read and write base files of llama.cpp: log-probabilities of a model, for `llama-perplexity --kl-divergence`.

Layout (tools/perplexity/perplexity.cpp): "_logits_", then i32 n_ctx, n_vocab, n_chunk, then i32
tokens[n_chunk * n_ctx], then for each chunk a row for each of the positions n_ctx/2 .. n_ctx-2: f32 scale, f32
min_log_prob, u16 codes[n_vocab, padded to even]. The row at position p predicts the token at p + 1. All little-endian.

The stored tokens are those of the text. If the vocabulary adds BOS, it replaces the first token of every chunk, for the
forward pass only: see `with_bos`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

import edgetune_native
from edgetune.errors import DataError
from edgetune.reference.codecs import F32, F64, I64, leave_out_negligible
from edgetune_converters.files import atomic

MAGIC = b"_logits_"
_HEADER = struct.Struct("<8siii")
_ROUNDING = 0.05
"""How far the stored probabilities of a row may be from 1 in sum. Rounding to 16 bits moves each by 1.3e-4 of itself
at most (half a step of 16/65535); leaving out what is below exp(-16) takes 0.02 from 152,000 tokens at the worst."""
HINT = "Write it again with `llama-perplexity --kl-divergence-base FILE`, or `edgetune reference RUN --llama-kld FILE`."


@dataclass(frozen=True)
class KldComparison:
    """A comparison with a base file, one entry per scored position."""

    kld: F64
    """Nats, by llama-perplexity's formula: the stored probabilities are not normalized."""
    same_top: NDArray[np.bool_]
    nll: F64
    """Negative log-likelihood of the token of the text, in nats."""
    nll_base: F64
    """The same of the base, as it is stored."""


def scored_positions(n_ctx: int) -> I64:
    """Return the positions of a chunk whose tokens are scored: n_ctx/2 + 1 .. n_ctx - 1."""
    return np.arange(n_ctx // 2 + 1, n_ctx)


def with_bos(chunk: NDArray[np.int32], bos: int | None) -> NDArray[np.int32]:
    """Return the input tokens of a chunk. `bos`: the BOS token of a vocabulary that adds one, else None."""
    tokens = np.array(chunk, np.int32)
    if bos is not None:
        tokens[0] = bos
    return tokens


def _row_type(vocab_size: int) -> np.dtype[Any]:
    padded = 2 * ((vocab_size + 1) // 2)
    return np.dtype([("scale", "<f4"), ("min_log_prob", "<f4"), ("codes", "<u2", (padded,))])


class KldBaseFile:
    """A base file, opened and checked; its rows stay on disk."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raises DataError if it is foreign, truncated or inconsistent."""
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as stream:
                self._read_header(stream.read(_HEADER.size))
                self._check_size(size)
                raw = stream.read(4 * self.chunks * self.context)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}", HINT) from None
        self.tokens: NDArray[np.int32] = np.frombuffer(raw, "<i4").reshape(self.chunks, self.context).astype(np.int32)
        if self.tokens.min() < 0 or self.tokens.max() >= self.vocab_size:
            raise self._damaged(f"it has tokens outside its vocabulary of {self.vocab_size}")

    @property
    def rows_per_chunk(self) -> int:
        """Scored positions per chunk."""
        return self.context - 1 - self.context // 2

    @property
    def rows(self) -> int:
        """Scored positions of all chunks."""
        return self.chunks * self.rows_per_chunk

    def _read_header(self, head: bytes) -> None:
        if not head.startswith(MAGIC):
            raise DataError(f"{self.path} is not a file of llama.cpp's log-probabilities", HINT)
        if len(head) < _HEADER.size:
            raise self._damaged("it ends within its header")
        found: tuple[int, int, int] = _HEADER.unpack(head)[1:]
        self.context, self.vocab_size, self.chunks = found
        if self.context < 3 or self.vocab_size < 1 or self.chunks < 1:
            raise self._damaged(
                f"its header says {self.chunks} chunks of {self.context} tokens, a vocabulary of {self.vocab_size}"
            )

    def _check_size(self, size: int) -> None:
        start = _HEADER.size + 4 * self.chunks * self.context
        wanted = start + self.rows * (8 + 4 * ((self.vocab_size + 1) // 2))
        if size != wanted:
            what = "is truncated" if size < wanted else "is longer than its header says"
            raise self._damaged(f"it {what}: {size:,} of {wanted:,} bytes")

    def _damaged(self, why: str) -> DataError:
        return DataError(f"{self.path} is damaged: {why}", HINT)

    def _read_rows(self, start: int, stop: int) -> NDArray[Any]:
        """Read rows; a memory map would be slower, and its pages would stay in the process."""
        kind = _row_type(self.vocab_size)
        skipped = _HEADER.size + 4 * self.chunks * self.context + start * kind.itemsize
        with self.path.open("rb", buffering=0) as stream:
            return np.fromfile(stream, kind, stop - start, offset=skipped)

    @cached_property
    def targets(self) -> I64:
        """[rows] the tokens at the scored positions."""
        return self.tokens[:, self.context // 2 + 1 :].reshape(-1).astype(np.int64)

    def log_probs(self, start: int, stop: int, *, threads: int = 0) -> F32:
        """Return the base's log-probabilities [stop - start, V]. Raises DataError for rows that are damaged."""
        part = self._read_rows(start, stop)
        if len(part) != stop - start:
            raise self._damaged(f"it ends before row {stop}")
        scale, low = np.ascontiguousarray(part["scale"]), np.ascontiguousarray(part["min_log_prob"])
        # the likeliest token has the largest code there is, so no other is above it, and none above a probability of 1
        with np.errstate(over="ignore", invalid="ignore"):
            highest = low + np.float32(65535) * scale
        if not (np.isfinite(highest).all() and (scale >= 0).all() and (highest < _ROUNDING).all()):
            raise self._damaged(f"rows {start} to {stop} hold numbers that are not log-probabilities")
        codes = np.ascontiguousarray(part["codes"][:, : self.vocab_size], np.uint16)
        return edgetune_native.decode_log_probs(scale, low, codes, threads=threads)

    def compare(self, start: int, logits: F32, *, threads: int = 0) -> KldComparison:
        """Compare another model's logits [m, V] at scored positions start .. start + m - 1 with the base."""
        stop = start + len(logits)
        base, targets = self.log_probs(start, stop, threads=threads), self.targets[start:stop]
        nll_base = -base[np.arange(len(base)), targets].astype(np.float64)
        leave_out_negligible(base)  # as llama-perplexity does
        total = np.exp(base).sum(axis=1, dtype=np.float64)
        if (abs(total - 1) > _ROUNDING).any():
            bad = start + int(abs(total - 1).argmax())
            raise self._damaged(f"the probabilities of row {bad} add up to {total[bad - start]:.3g}")
        compared = edgetune_native.compare(base, logits, targets, threads=threads)
        # sum p log(p/q) over p that add up to `total`, from the divergence of the normalized p
        kld = total * (compared.kld + np.log(total))
        return KldComparison(kld, compared.same_top, compared.nll, nll_base)


class KldBaseWriter:
    """Writes a base file row by row; a context manager that publishes on success and leaves nothing on failure."""

    def __init__(self, path: Path, tokens: NDArray[np.int32], vocab_size: int) -> None:
        """Start a file for `tokens` [n_chunk, n_ctx] of the text."""
        self.path = path
        self.tokens = np.ascontiguousarray(tokens, "<i4")
        self.vocab_size = vocab_size
        self._replacing = atomic.replacing(path)
        self._left = len(tokens) * len(scored_positions(tokens.shape[1]))

    def __enter__(self) -> Self:
        self._stream = self._replacing.__enter__().open("wb")
        chunks, context = self.tokens.shape
        self._stream.write(_HEADER.pack(MAGIC, context, self.vocab_size, chunks))
        self._stream.write(self.tokens.tobytes())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        if kind is None and self._left:
            error = DataError(f"{self.path}: {self._left} rows were not written")
            self._replacing.__exit__(DataError, error, None)
            raise error
        self._replacing.__exit__(kind, value, trace)

    def add(self, logits: F32) -> None:
        """Add the logits [m, V] at the next m scored positions."""
        scale, low, codes = edgetune_native.encode_log_probs(np.ascontiguousarray(logits, np.float32))
        rows = np.zeros(len(logits), _row_type(self.vocab_size))
        rows["scale"], rows["min_log_prob"], rows["codes"][:, : self.vocab_size] = scale, low, codes
        self._stream.write(rows.tobytes())
        self._left -= len(logits)


def split_into_chunks(tokens: NDArray[np.int32], context: int) -> NDArray[np.int32]:
    """Split tokens into chunks [n_chunk, context] and drop the rest. Raises DataError if there is not one chunk."""
    count = len(tokens) // context
    if not count:
        raise DataError(
            f"there are {len(tokens)} tokens, fewer than one chunk of {context}", "Give more rows, or a smaller chunk."
        )
    return np.ascontiguousarray(tokens[: count * context].reshape(count, context), np.int32)


def iterate_chunks(base: KldBaseFile) -> Iterator[tuple[int, NDArray[np.int32]]]:
    """Yield the index of the first row, and the tokens, of each chunk."""
    for number, chunk in enumerate(base.tokens):
        yield number * base.rows_per_chunk, chunk
