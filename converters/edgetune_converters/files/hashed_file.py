"""A file being written whose SHA-256 is there when it is whole: hashing follows the writing on a thread of its own.

The beginning may change until `settle`; only then hashing starts, and catches up through the system's cache.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

_PIECE_BYTES = 256 * 1024
_WRITEBACK_BYTES = 32 * 1024 * 1024
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h


def joined_hash(hashes: Sequence[str]) -> str:
    """One hash for the parts of an artifact: the only one, or the SHA-256 of them all, a line each."""
    if len(hashes) == 1:
        return hashes[0]
    return hashlib.sha256("".join(f"{each}\n" for each in hashes).encode()).hexdigest()


class HashedFile:
    """Replaces `path` at once. `close` must be called; it is safe to call twice."""

    def __init__(self, path: Path, body: int | None = None) -> None:
        """`body`: where that begins which has a hash of its own, if something has."""
        self._body_digest = hashlib.sha256()
        self._body = body
        self._file = path.open("w+b", buffering=0)
        self._pool = ThreadPoolExecutor(1, "edgetune-digest")
        self._digest = hashlib.sha256()
        self._written = self._hashed = self._begun = 0
        self._settled = False
        self._last: Future[None] | None = None

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]
        self._written += len(data)
        if self._written - self._begun >= _WRITEBACK_BYTES:
            start_writeback(self._file.fileno(), self._begun, self._written - self._begun)
            self._begun = self._written
        self._follow()

    def settle(self, beginning: bytes = b"") -> None:
        """Write the beginning again, which does not change after this."""
        done = 0
        while done < len(beginning):
            done += os.pwrite(self._file.fileno(), beginning[done:], done)
        self._settled = True
        if self._last is None:
            self._follow()

    def sync(self) -> None:
        """Force it to disk."""
        os.fsync(self._file.fileno())

    def end(self) -> None:
        """Nothing more will be written: the thread ends when it has caught up."""
        self._last = self._pool.submit(self._catch_up)
        self._pool.shutdown(wait=False)

    def hexdigest(self) -> str:
        """SHA-256 of all that was written. Errors: OSError when it cannot be read back."""
        if self._last is None:
            self.end()
        assert self._last is not None
        self._last.result()
        return self._digest.hexdigest()

    def body_hexdigest(self) -> str:
        """SHA-256 of what has been written from `body` on. Errors: OSError when it cannot be read back."""
        if self._last is None:
            self._pool.submit(self._follow_body).result()
        else:
            self._last.result()
        return self._body_digest.hexdigest()

    def close(self) -> None:
        """Stop hashing and close the file."""
        self._pool.shutdown(cancel_futures=True)
        self._file.close()

    def _follow(self) -> None:
        if self._settled:
            self._pool.submit(self._catch_up)
        elif self._body is not None:
            self._pool.submit(self._follow_body)

    def _catch_up(self) -> None:
        self._follow_body()
        self._hashed = self._update(self._digest, self._hashed)

    def _follow_body(self) -> None:
        if self._body is not None:
            self._body = self._update(self._body_digest, self._body)

    def _update(self, digest: hashlib._Hash, start: int) -> int:
        """Hash from `start` to what has been written; returns where that ends."""
        while start < self._written:
            count = min(_PIECE_BYTES, self._written - start)
            piece = os.pread(self._file.fileno(), count, start)
            if not piece:
                raise OSError(f"{self._file.name} is shorter than what was written to it")
            digest.update(piece)
            start += len(piece)
        return start


@cache
def _sync_file_range() -> Any:
    """Linux's system call of that name; None elsewhere."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


def start_writeback(descriptor: int, first: int, count: int) -> None:
    """Let the disk begin with what was written, so that forcing the whole file to it in the end does not take long.

    A hint: whether it fails does not matter.
    """
    function = _sync_file_range()
    if function is not None:
        function(descriptor, first, count, _SYNC_FILE_RANGE_WRITE)
