"""Leaving the system's page cache as it was found: what a pass brought in goes out again behind it.

A model read through the cache fills as much memory as the model is large, which other programs then miss, and every
page of it has to be found first; on a virtual machine whose host takes free memory back, that costs several times what
the reading itself does. So a chunk of a file that was not in the cache before is dropped once everybody who reads it
has done so: the pass, and the hash of the file. Its pages are then those of the next chunk.

Only hints are given to the system: none of them changes what is read.
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

CHUNK_BYTES = 16 * 1024 * 1024  # a multiple of the largest pieces that caches hold, 2 MB
_KEPT_CHUNKS = 4  # that have been read by all: readers beside each other share pages at the borders of their rows


class PassingPages:
    """The pages of one mapped file, of which those that were not cached when it was opened are dropped when read.

    Two go through the file: the pass, row by row in an order of its own and from byte `first` on, and one that goes
    from the beginning to the end. Nothing is dropped before `follow`. Calls may come from any thread.
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
        """From now on drop what was passed and followed. Returns whether there is anything to drop."""
        if not hasattr(os, "posix_fadvise") or not hasattr(mmap, "MADV_DONTNEED"):  # not everywhere
            return False
        count = -(-self._size // CHUNK_BYTES)
        cached = cached_pages(self._map, self._size)
        per_chunk = CHUNK_BYTES // mmap.PAGESIZE
        ours = [index for index in range(count) if not cached[index * per_chunk : (index + 1) * per_chunk].any()]
        with self._lock, suppress(OSError):  # a file that has vanished is for its readers to say
            self._file = os.open(self._path, os.O_RDONLY)
            self._left = {index: min(CHUNK_BYTES, self._size - index * CHUNK_BYTES) for index in ours}
            self._count(0, self._first, self._first)
        return bool(self._left)

    def passed(self, start: int, stop: int, read: float) -> None:
        """`read` bytes, spread over start..stop, have been read by the pass."""
        with self._lock:
            self.passed_bytes += read
            self._count(start, stop, read)
            self._drop()

    def followed(self, position: int) -> None:
        """The other one has come so far."""
        with self._lock:
            self._followed = position
            self._drop()

    def close(self) -> None:
        """Drop nothing any more."""
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
            if self._left[index] < 0.01:  # of a byte: sums of fractions are not exact
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
        self._map.madvise(mmap.MADV_DONTNEED, start, length)  # pages that are mapped would stay
        os.posix_fadvise(self._file, start, length, os.POSIX_FADV_DONTNEED)


def cached_pages(mapped: mmap.mmap, size: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """For each page of a map whether it is in the system's cache; all of them where the system does not say."""
    pages = np.ones(-(-size // mmap.PAGESIZE), np.uint8)
    function = _mincore()
    if function is not None:
        address = np.frombuffer(mapped, np.uint8, 1).ctypes.data
        function(address, size, pages.ctypes.data)  # leaves ones where it fails
    return (pages & 1).astype(np.bool_)


@cache
def _mincore() -> Any:
    """The system call of that name; None where there is none."""
    function = getattr(ctypes.CDLL(None), "mincore", None)
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    return function
