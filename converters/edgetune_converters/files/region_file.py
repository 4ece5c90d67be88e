"""A file of a known size that is written here and there, and whose SHA-256 is there soon after the last byte.

It consists of regions. Hashing follows on a thread of its own, through the system's cache, from the beginning of the
file over the regions that are whole, and lets the disk begin with what was hashed.
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
    """Where it begins, and how many bytes are written into it. What lies between it and the next one stays zero."""

    start: int
    bytes: int


class RegionFile:
    """Must not exist before. `close` must be called; it is safe to call twice."""

    def __init__(self, path: Path, size: int, regions: Iterable[Region]) -> None:
        """`regions` in the order of the file."""
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        os.truncate(self._file, size)
        self._size = size
        self._left = dict(
            regions
        )  # bytes to be written of those that are not whole; the first of them is the first here
        self._digest = hashlib.sha256()
        self._hashed = self._begun = 0
        self._pool = ThreadPoolExecutor(1, "edgetune-digest")

    def write(self, region: int, rows: NDArray[np.uint8], offset: int, step: int = 1) -> None:
        """Write rows of the region that begins at byte `region` from byte `offset` on, to each `step`th place there."""
        if step == 1:
            self._put(memoryview(rows.reshape(-1).data), offset)
        else:
            self._put_between(rows, offset, step)
        self._left[region] -= rows.size
        if not self._left[region]:
            del self._left[region]
            self._pool.submit(self._catch_up, next(iter(self._left), self._size))

    def finish(self) -> str:
        """Force it to disk, after the last write; returns the SHA-256. Errors: OSError when it cannot be read back."""
        rest = self._pool.submit(self._catch_up, self._size)
        os.fsync(self._file)
        rest.result()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Stop hashing and close the file."""
        self._pool.shutdown(cancel_futures=True)
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _put(self, view: memoryview, offset: int) -> None:
        while view:
            written = os.pwrite(self._file, view, offset)
            view, offset = view[written:], offset + written

    def _put_between(self, rows: NDArray[np.uint8], offset: int, step: int) -> None:
        width = rows.shape[1]
        start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        length = offset - start + ((len(rows) - 1) * step + 1) * width
        with mmap.mmap(self._file, length, offset=start) as mapped:
            target: NDArray[Any] = np.ndarray(rows.shape, np.uint8, mapped, offset - start, strides=(step * width, 1))
            target[:] = rows
            del target

    def _catch_up(self, end: int) -> None:
        buffer = memoryview(bytearray(_PIECE_BYTES))
        while self._hashed < end:
            count = os.preadv(self._file, [buffer[: end - self._hashed]], self._hashed)
            if not count:
                raise OSError(f"{self._path} is shorter than what was written to it")
            self._digest.update(buffer[:count])
            self._hashed += count
            if self._hashed - self._begun >= _WRITEBACK_BYTES:
                start_writeback(self._file, self._begun, self._hashed - self._begun)
                self._begun = self._hashed
