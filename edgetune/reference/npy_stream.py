"""Write .npy files in pieces, resumable after a kill."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.files.contents import sha256_of


class NpyStream:
    """A .npy file of known final shape, written row by row."""

    def __init__(self, path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self.path = path
        self.dtype = dtype
        self.shape = shape
        self.stream = path.open("w+b")
        description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.stream, description)
        self._data = self.stream.tell()

    @classmethod
    def reopen(cls, path: Path, rows: int) -> NpyStream:
        """Reopen a file after its first `rows` rows. Raises ValueError if it has fewer."""
        stream = cls.__new__(cls)
        stream.path = path
        stream.stream = path.open("r+b")
        try:
            stream._seek_row(rows)
        except ValueError:
            stream.stream.close()
            raise
        return stream

    def _seek_row(self, rows: int) -> None:
        if np.lib.format.read_magic(self.stream) != (1, 0):
            raise ValueError(f"{self.path} is not a column")
        self.shape, _, self.dtype = np.lib.format.read_array_header_1_0(self.stream)
        self._data = self.stream.tell()
        end = self._data + rows * self._row_bytes
        if self.path.stat().st_size < end:
            raise ValueError(f"{self.path} holds fewer than {rows} rows")
        self.stream.truncate(end)
        self.stream.seek(end)

    @property
    def _row_bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))

    def append(self, values: NDArray[Any]) -> None:
        """Append rows."""
        self.stream.write(np.ascontiguousarray(values).data)

    def read(self, start: int, count: int) -> NDArray[Any]:
        """Read `count` rows from `start`."""
        self.stream.flush()
        raw = os.pread(self.stream.fileno(), count * self._row_bytes, self._data + start * self._row_bytes)
        return np.frombuffer(raw, self.dtype).reshape(count, *self.shape[1:])

    def flush(self) -> None:
        """Flush to disk."""
        self.stream.flush()
        os.fsync(self.stream.fileno())

    def finish(self) -> str:
        """Flush to disk and return the SHA-256 of the file."""
        self.flush()
        self.stream.close()
        return sha256_of(self.path)
