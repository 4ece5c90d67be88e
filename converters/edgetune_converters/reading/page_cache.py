"""Leave the system's page cache as it was: drop the pages that a pass brought in.

A model read through the cache occupies as much memory as the model is large, which other programs then miss, and every
page has to be found first; on a virtual machine whose host reclaims free memory, that costs several times the reading
itself. So a chunk of a file that was not cached before is dropped once both readers are done with it: the pass, and the
hash of the file. Its pages are then reused for the next chunk.

The system only gets hints: they never change what is read.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections import deque
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

CHUNK_BYTES = 16 * 1024 * 1024  # a multiple of the largest page of a cache, 2 MB
_KEPT_CHUNKS = 4  # only complete chunks: readers of neighboring rows share the pages at the borders


class PassingPages:
    """The pages of one mapped file; those not cached when it was opened are dropped after reading.

    Two readers go through the file: the pass, in an order of its own and from byte `first` on, and the hash, from the
    beginning to the end. Nothing is dropped before `follow`. All methods are thread-safe.
    """

    def __init__(self, path: Path, mapped: mmap.mmap, size: int, first: int) -> None:
        self.passed_bytes: float = first
        self._path = path
        self._map = mapped
        self._size = size
        self._first = first
        self._lock = threading.Lock()
        self._file: int | None = None
        self._left: dict[int, float] = {}
        self._followed = 0
        self._waiting: set[int] = set()
        self._read: deque[int] = deque()

    def follow(self) -> bool:
        """Start dropping what both readers have read. Return whether there is anything to drop."""
        if not hasattr(os, "posix_fadvise") or not hasattr(mmap, "MADV_DONTNEED"):  # not on every system
            return False
        count = -(-self._size // CHUNK_BYTES)
        cached = cached_pages(self._map, self._size)
        per_chunk = CHUNK_BYTES // mmap.PAGESIZE
        ours = [index for index in range(count) if not cached[index * per_chunk : (index + 1) * per_chunk].any()]
        with self._lock, suppress(OSError):  # a vanished file is reported by its readers
            self._file = os.open(self._path, os.O_RDONLY)
            self._left = {index: min(CHUNK_BYTES, self._size - index * CHUNK_BYTES) for index in ours}
            self._count(0, self._first, self._first)
        return bool(self._left)

    def passed(self, start: int, stop: int, read: float) -> None:
        """Record that the pass has read `read` bytes, spread over start..stop."""
        with self._lock:
            self.passed_bytes += read
            self._count(start, stop, read)
            self._drop()

    def followed(self, position: int) -> None:
        """Record that the hashing thread has reached `position`."""
        with self._lock:
            self._followed = position
            self._drop()

    def close(self) -> None:
        """Stop dropping pages."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
            self._file, self._left = None, {}
            self._waiting.clear()

    def _count(self, start: int, stop: int, read: float) -> None:
        for index in range(start // CHUNK_BYTES, -(-stop // CHUNK_BYTES)):
            if index not in self._left:
                continue
            first, last = max(start, index * CHUNK_BYTES), min(stop, (index + 1) * CHUNK_BYTES)
            self._left[index] -= read * (last - first) / (stop - start)
            if self._left[index] < 0.01:  # in bytes: sums of fractions are not exact
                del self._left[index]
                self._waiting.add(index)

    def _drop(self) -> None:
        if self._file is None:
            return
        done = [index for index in self._waiting if min((index + 1) * CHUNK_BYTES, self._size) <= self._followed]
        self._waiting.difference_update(done)
        self._read.extend(done)
        while len(self._read) > _KEPT_CHUNKS:
            self._forget(self._read.popleft())

    def _forget(self, index: int) -> None:
        assert self._file is not None
        start = index * CHUNK_BYTES
        length = min(CHUNK_BYTES, self._size - start)
        self._map.madvise(mmap.MADV_DONTNEED, start, length)  # mapped pages would stay
        os.posix_fadvise(self._file, start, length, os.POSIX_FADV_DONTNEED)


def cached_pages(mapped: mmap.mmap, size: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return for each page of a map whether it is cached; all True where the system does not tell."""
    pages = np.ones(-(-size // mmap.PAGESIZE), np.uint8)
    function = _mincore()
    if function is not None:
        address = np.frombuffer(mapped, np.uint8, 1).ctypes.data
        function(address, size, pages.ctypes.data)  # the ones stay where the call fails
    return (pages & 1).astype(np.bool_)


@cache
def _mincore() -> Any:
    """The system call of that name; None where there is none."""
    function = getattr(ctypes.CDLL(None), "mincore", None)
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    return function
