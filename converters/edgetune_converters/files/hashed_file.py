"""A file whose SHA-256 is known soon after its last byte: a thread of its own hashes what has been written.

The header may change until `fix_header`. Hashing of the whole file starts then, and reads from the page cache.
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
    """Return one hash for the parts of an artifact: the only one, or the SHA-256 of all of them, one a line."""
    if len(hashes) == 1:
        return hashes[0]
    return hashlib.sha256("".join(f"{each}\n" for each in hashes).encode()).hexdigest()


class HashedFile:
    """A file being written and hashed. An older file is truncated at once. `close` may be called twice."""

    def __init__(self, path: Path, body_start: int | None = None) -> None:
        """Open the file. `body_start`: the byte after the header, where the body is to have a hash of its own."""
        self._body_digest = hashlib.sha256()
        self._body_hashed = body_start  # end of what is hashed of the body
        self._file = path.open("w+b", buffering=0)
        self._pool = ThreadPoolExecutor(1, "edgetune-digest")
        self._digest = hashlib.sha256()
        self._written = self._hashed = self._writeback = 0
        self._header_is_final = False
        self._last: Future[None] | None = None  # the end of all hashing

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]
        self._written += len(data)
        if self._written - self._writeback >= _WRITEBACK_BYTES:
            start_writeback(self._file.fileno(), self._writeback, self._written - self._writeback)
            self._writeback = self._written
        self._follow()

    def fix_header(self, header: bytes = b"") -> None:
        """Overwrite the beginning of the file with `header`. It must not change after this."""
        done = 0
        while done < len(header):
            done += os.pwrite(self._file.fileno(), header[done:], done)
        self._header_is_final = True
        if self._last is None:
            self._follow()

    def sync(self) -> None:
        """Force the file to disk."""
        os.fsync(self._file.fileno())

    def end(self) -> None:
        """Declare the last byte written: the thread ends when it has caught up."""
        self._end()

    def hexdigest(self) -> str:
        """Return the SHA-256 of the file after the last write. Raises OSError when it cannot be read back."""
        self._end().result()
        return self._digest.hexdigest()

    def body_hexdigest(self) -> str:
        """Return the SHA-256 of what has been written of the body. Raises OSError when it cannot be read back."""
        hashing = self._pool.submit(self._hash_body) if self._last is None else self._last
        hashing.result()
        return self._body_digest.hexdigest()

    def close(self) -> None:
        """Stop hashing and close the file."""
        self._pool.shutdown(cancel_futures=True)
        self._file.close()

    def _end(self) -> Future[None]:
        if self._last is None:
            self._last = self._pool.submit(self._hash_all)
            self._pool.shutdown(wait=False)
        return self._last

    def _follow(self) -> None:
        if self._header_is_final:
            self._pool.submit(self._hash_all)
        elif self._body_hashed is not None:
            self._pool.submit(self._hash_body)

    def _hash_all(self) -> None:
        self._hash_body()
        self._hashed = self._update(self._digest, self._hashed)

    def _hash_body(self) -> None:
        if self._body_hashed is not None:
            self._body_hashed = self._update(self._body_digest, self._body_hashed)

    def _update(self, digest: hashlib._Hash, start: int) -> int:
        """Hash from `start` to the end of what has been written, and return that end."""
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
    """Return Linux's system call of that name; None elsewhere."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


def start_writeback(descriptor: int, first: int, count: int) -> None:
    """Let the disk begin to write these bytes, so that the final fsync takes less time.

    A hint: a failure does not matter.
    """
    function = _sync_file_range()
    if function is not None:
        function(descriptor, first, count, _SYNC_FILE_RANGE_WRITE)
