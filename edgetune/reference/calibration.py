"""Training rows as token ids, kept in the run: an importance matrix is computed from them where nothing can tokenize.

The held-out rows, on which files are measured, are not among them.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from edgetune.data.encoded_rows import EncodedRows
from edgetune.errors import RunDirectoryError
from edgetune_converters.files.atomic import replacing

MOST_TOKENS = 65_536
_DAMAGE = (OSError, ValueError, KeyError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)
_SEED = 0
I32 = NDArray[np.int32]


@dataclass(frozen=True)
class CalibrationRows:
    """Rows of token ids one behind another.

    Attributes:
        ids: i32 [n].
        ends: Where each row ends, i64 [rows].
    """

    ids: I32
    ends: NDArray[np.int64]

    @classmethod
    def choose(cls, rows: EncodedRows, most_tokens: int = MOST_TOKENS) -> Self:
        """Choose rows of a split at random, always the same, until there are `most_tokens`."""
        ids, _, ends = rows.buffers
        stops = np.array(ends, np.int64)
        starts = np.r_[0, stops[:-1]].astype(np.int64) if len(stops) else stops
        order = np.random.default_rng(_SEED).permutation(len(stops))
        lengths = (stops - starts)[order]
        order = order[: int(np.searchsorted(np.cumsum(lengths), most_tokens)) + 1]
        every = np.array(ids, np.int32)
        chosen = [every[starts[index] : stops[index]] for index in order]
        return cls(np.concatenate([*chosen, every[:0]]), np.cumsum([len(row) for row in chosen], dtype=np.int64))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the file. Raises RunDirectoryError if it is damaged."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                found = cls(stored["ids"], stored["ends"])
        except _DAMAGE as error:
            raise RunDirectoryError(f"{path} cannot be read: {error}", _HINT) from error
        if not found._is_whole():
            raise RunDirectoryError(f"{path} is damaged", _HINT)
        return found

    def _is_whole(self) -> bool:
        kinds = (self.ids.dtype.str, self.ids.ndim, self.ends.dtype.str, self.ends.ndim)
        if kinds != ("<i4", 1, "<i8", 1):
            return False
        bounds = np.r_[0, self.ends]
        return bool(bounds[-1] == len(self.ids) and (np.diff(bounds) >= 0).all())

    def write(self, path: Path) -> None:
        """Write the file; it is renamed into place."""
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, ids=self.ids, ends=self.ends)

    def first(self, most_tokens: int) -> Iterator[I32]:
        """Yield the rows up to a number of tokens; the last of them is cut."""
        bounds = [0, *self.ends.tolist()]
        for start, stop in pairwise(bounds):
            if start >= most_tokens:
                return
            if stop > start:
                yield self.ids[start : min(stop, most_tokens)]

    @property
    def digest(self) -> str:
        """SHA-256 of ids and ends."""
        return hashlib.sha256(self.ids.tobytes() + self.ends.tobytes()).hexdigest()


_HINT = "Train the run again, or give --imatrix the file of an importance matrix"
