"""A table of n-grams of a run's training answers, from which an engine guesses tokens ahead.

A fine-tuned model often continues as its training answers do. The table has the most frequent next token behind
contexts of 1 to 8 tokens, with the share of the cases in which it came next. A context is kept if it came at least
twice, and if shorter ones would guess otherwise: a sequence that is in one answer alone is not in the table.

The file FILE.ngrams lies beside FILE: a header, then the cells of an open hash table, which `native/src/llama_ngrams.c`
reads as they are.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.errors import ArtifactError
from edgetune_converters.files.atomic import replacing

if TYPE_CHECKING:
    from edgetune.data.encoded_rows import EncodedRows

SUFFIX = ".ngrams"
LONGEST = 8
_MAGIC, _VERSION = b"ETNGRAMS", 1
_HEADER = struct.Struct("<8s3I32s")  # magic, version, longest context, cells, SHA-256 of the vocabulary
_MOST_TOKENS = 4_000_000  # that are counted: a few seconds
_MOST_CONTEXTS = 160_000
_MOST_CELLS = 1 << 18  # 2 MiB
_LEAST_CASES = 2
_SAME_SHARE = 0.15  # a longer context with the same token and a share so near is left out
_SEED, _FACTOR = 0x9E3779B97F4A7C15, 0xFF51AFD7ED558CCD
U64 = NDArray[np.uint64]
_NO_VOCABULARY = bytes(32)


class Answers(NamedTuple):
    """Rows of token ids one behind another.

    Attributes:
        ids: i32 [n].
        is_answer: Whether each token is part of an answer, bool [n].
        starts: Where the row of each token begins, i64 [n].
    """

    ids: NDArray[np.int32]
    is_answer: NDArray[np.bool_]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, rows: EncodedRows) -> Self:
        """Return the rows of a split."""
        ids, supervised, ends = rows.buffers
        bounds = np.r_[0, np.array(ends, np.int64)]
        return cls(
            np.array(ids, np.int32), np.frombuffer(supervised, np.bool_), np.repeat(bounds[:-1], np.diff(bounds))
        )


@dataclass(frozen=True)
class NgramTable:
    """The table.

    Attributes:
        cells: u64 [a power of 2], 0 if empty: 24 bits of a context's hash, 8 bits of the share, 32 bits of the token.
        longest: Tokens of the longest contexts.
        vocabulary: SHA-256 of the vocabulary; zeros where none is stated.
    """

    cells: U64
    longest: int
    vocabulary: bytes = _NO_VOCABULARY

    @classmethod
    def count(cls, answers: Answers) -> Self | None:
        """Count what follows what in answers; None if nothing comes twice."""
        contexts = _Contexts(answers)
        for length in range(1, LONGEST + 1):
            contexts.count(length)
        found = contexts.most_frequent(_MOST_CONTEXTS)
        return cls(_fill(*found), LONGEST) if len(found[0]) else None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file. Raises ArtifactError if it is damaged or of a newer version."""
        data = path.read_bytes()
        if len(data) < _HEADER.size or not data.startswith(_MAGIC):
            raise ArtifactError(f"{path} is no table of n-grams", "Export the model again, or remove the file")
        _, version, longest, count, vocabulary = _HEADER.unpack_from(data)
        if version != _VERSION:
            raise ArtifactError(
                f"{path} is a table of n-grams of version {version}, and this edgetune reads version {_VERSION}",
                "Update edgetune, or remove the file",
            )
        if count < 1 or count & (count - 1) or count > _MOST_CELLS or len(data) != _HEADER.size + 8 * count:
            raise ArtifactError(f"{path} is damaged", "Export the model again, or remove the file")
        return cls(np.frombuffer(data, "<u8", offset=_HEADER.size).astype(np.uint64), longest, vocabulary)

    def write(self, path: Path) -> None:
        """Write the file; it is renamed into place."""
        header = _HEADER.pack(_MAGIC, _VERSION, self.longest, len(self.cells), self.vocabulary)
        with replacing(path) as temporary:
            temporary.write_bytes(header + self.cells.astype("<u8").tobytes())

    def for_vocabulary(self, tokens: Iterable[str]) -> Self:
        """Return the table with the vocabulary whose ids it has."""
        return replace(self, vocabulary=vocabulary_hash(tokens))


def path_beside(artifact: Path) -> Path:
    """Return where the table of an exported file is."""
    return artifact.with_name(artifact.name + SUFFIX)


def vocabulary_hash(tokens: Iterable[str]) -> bytes:
    """Return the SHA-256 of the tokens of a vocabulary in the order of their ids."""
    return hashlib.sha256(b"\0".join(token.encode("utf-8", "surrogatepass") for token in tokens)).digest()


class _Contexts:
    """Counts contexts of growing length, and keeps those that say more than shorter ones."""

    def __init__(self, answers: Answers) -> None:
        self._ids = answers.ids
        self._places = np.flatnonzero(answers.is_answer)[:_MOST_TOKENS]
        self._room = self._places - answers.starts[self._places]
        self._next = answers.ids[self._places].astype(np.int64)
        self._hashes: U64 = np.full(len(self._places), _SEED, np.uint64)
        self._guess = np.full(len(self._places), -1, np.int64)
        self._share = np.zeros(len(self._places))
        """What the contexts so far guess at each place."""
        self._kept: list[tuple[U64, NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]] = []

    def count(self, length: int) -> None:
        valid = np.flatnonzero(self._room >= length)
        hashes = _extended(self._hashes[valid], self._ids[self._places[valid] - length])
        self._hashes[valid] = hashes
        if not len(valid):
            return
        order = np.lexsort((self._next[valid], hashes))
        hashes, tokens = hashes[order], self._next[valid][order]
        begins = np.r_[True, hashes[1:] != hashes[:-1]]
        pairs = np.flatnonzero(begins | np.r_[True, tokens[1:] != tokens[:-1]])
        cases = np.diff(np.r_[pairs, len(order)])
        context = np.cumsum(begins)[pairs] - 1
        total = np.bincount(context, cases).astype(np.int64)
        best = np.lexsort((tokens[pairs], -cases, context))[np.flatnonzero(np.r_[True, context[1:] != context[:-1]])]
        share = cases[best] / (total + 1)
        before = valid[order[pairs[best]]]  # one place of each context
        same = (self._guess[before] == tokens[pairs[best]]) & (np.abs(self._share[before] - share) <= _SAME_SHARE)
        kept = (cases[best] >= _LEAST_CASES) & ~same
        self._kept.append((hashes[pairs[best]][kept], tokens[pairs[best]][kept], share[kept], cases[best][kept]))
        of_place = np.cumsum(begins) - 1
        changed = kept[of_place]
        self._guess[valid[order[changed]]] = tokens[pairs[best]][of_place[changed]]
        self._share[valid[order[changed]]] = share[of_place[changed]]

    def most_frequent(self, most: int) -> tuple[U64, NDArray[np.int64], NDArray[np.float64]]:
        """Return hash, next token and share of the most frequent contexts."""
        if not self._kept:
            return np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0)
        hashes, tokens, share, cases = (np.concatenate(each) for each in zip(*self._kept, strict=True))
        chosen = np.argsort(-cases, kind="stable")[:most]
        return hashes[chosen], tokens[chosen], share[chosen]


def _extended(hashes: U64, tokens: NDArray[np.int32]) -> U64:
    """Return the hashes of contexts one token longer, as llama_ngrams.c does."""
    mixed = (hashes ^ tokens.astype(np.uint32).astype(np.uint64)) * np.uint64(_FACTOR)
    return mixed ^ (mixed >> np.uint64(32))


def _fill(hashes: U64, tokens: NDArray[np.int64], share: NDArray[np.float64]) -> U64:
    """Return the cells of a hash table; the most frequent contexts come first."""
    count = 64
    while count < 1.5 * len(hashes):
        count *= 2
    cells = [0] * count
    marks = np.maximum(hashes >> np.uint64(40), np.uint64(1))
    values = (
        marks << np.uint64(40) | np.round(share * 255).astype(np.uint64) << np.uint64(32) | tokens.astype(np.uint64)
    )
    for at, value in zip((hashes & np.uint64(count - 1)).tolist(), values.tolist(), strict=True):
        place = at
        while cells[place]:
            place = (place + 1) % count
        cells[place] = value
    return np.array(cells, np.uint64)
