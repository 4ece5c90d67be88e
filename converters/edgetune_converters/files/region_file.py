"""A file of known size that is written in regions, in any order; its SHA-256 is known soon after the last byte.

A thread of its own hashes from the beginning of the file over the complete regions, reading from the page cache, and
starts the writeback of what it has hashed.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.files.hashed_file import start_writeback

_PIECE_BYTES = 256 * 1024
_WRITEBACK_BYTES = 32 * 1024 * 1024


class Region(NamedTuple):
    """Start and size of a region. The bytes between two regions stay zero."""

    start: int
    bytes: int


class RegionFile:
    """A new file being written and hashed. `close` may be called twice."""

    def __init__(self, path: Path, size: int, regions: Iterable[Region]) -> None:
        """Create the file, which must not exist. `regions` are in the order of the file."""
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        os.truncate(self._file, size)
        self._size = size
        self._left = dict(regions)  # bytes still to be written of the regions that are not complete, in file order
        self._digest = hashlib.sha256()
        self._hashed = self._writeback = 0
        self._pool = ThreadPoolExecutor(1, "edgetune-digest")

    def write(self, region: int, rows: NDArray[np.uint8], offset: int, step: int = 1) -> None:
        """Write rows from byte `offset` on, every `step`th row, into the region that starts at byte `region`."""
        if step == 1:
            self._write_at(memoryview(rows.reshape(-1).data), offset)
        else:
            self._write_strided(rows, offset, step)
        self._left[region] -= rows.size
        if not self._left[region]:
            del self._left[region]
            self._pool.submit(self._hash_to, next(iter(self._left), self._size))

    def finish(self) -> str:
        """Force the file to disk after the last write and return its SHA-256.

        Raises:
            OSError: The file cannot be read back.
        """
        rest = self._pool.submit(self._hash_to, self._size)
        os.fsync(self._file)
        rest.result()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Stop hashing and close the file."""
        self._pool.shutdown(cancel_futures=True)
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _write_at(self, view: memoryview, offset: int) -> None:
        while view:
            written = os.pwrite(self._file, view, offset)
            view, offset = view[written:], offset + written

    def _write_strided(self, rows: NDArray[np.uint8], offset: int, step: int) -> None:
        width = rows.shape[1]
        start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        length = offset - start + ((len(rows) - 1) * step + 1) * width
        with mmap.mmap(self._file, length, offset=start) as mapped:
            target: NDArray[Any] = np.ndarray(rows.shape, np.uint8, mapped, offset - start, strides=(step * width, 1))
            target[:] = rows
            del target

    def _hash_to(self, end: int) -> None:
        buffer = memoryview(bytearray(_PIECE_BYTES))
        while self._hashed < end:
            count = os.preadv(self._file, [buffer[: end - self._hashed]], self._hashed)
            if not count:
                raise OSError(f"{self._path} is shorter than what was written to it")
            self._digest.update(buffer[:count])
            self._hashed += count
            if self._hashed - self._writeback >= _WRITEBACK_BYTES:
                start_writeback(self._file, self._writeback, self._hashed - self._writeback)
                self._writeback = self._hashed
