"""Compressed files, recognized by their first bytes."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, cast

from edgetune.errors import DataError, EnvironmentProblem

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
"""Suffixes of compressed files that are read."""
_ZSTD = b"\x28\xb5\x2f\xfd"
_DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError, ValueError)


def decompress(stream: io.BufferedReader, path: Path) -> io.BufferedReader:
    """Return the content of a file that is compressed or not.

    Raises:
        EnvironmentProblem: If it is compressed with Zstandard, and no library for it is installed.
    """
    start = stream.peek(6)[:6]
    file = cast("BinaryIO", stream)
    if start.startswith(b"\x1f\x8b"):
        return _guard(gzip.GzipFile(fileobj=file), path, "gzip")
    if start.startswith(b"BZh"):
        return _guard(bz2.BZ2File(file), path, "bzip2")
    if start.startswith(b"\xfd7zXZ\x00"):
        return _guard(lzma.LZMAFile(file), path, "xz")
    if start.startswith(_ZSTD):
        return _guard(_open_zstd(stream, path), path, "Zstandard")
    return stream


def _guard(content: Any, path: Path, kind: str) -> io.BufferedReader:
    return io.BufferedReader(_Guarded(content, path, kind), 1 << 20)


class _Guarded(io.RawIOBase):
    """Decompressed content whose damage is a DataError."""

    def __init__(self, content: Any, path: Path, kind: str) -> None:
        self._content = content
        self._path = path
        self._kind = kind

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._content.read(len(buffer))
        except _DAMAGED as error:
            raise DataError(
                f"{self._path} is a damaged or incomplete {self._kind} file: {error}", "Fetch or compress it again"
            ) from None
        buffer[: len(data)] = data
        return len(data)


def _open_zstd(stream: io.BufferedReader, path: Path) -> Any:
    """Open a Zstandard file with the first library that is installed."""
    openers: Mapping[str, Callable[[Any], Any]] = {
        "compression.zstd": lambda zstd: zstd.ZstdFile(stream),
        "zstandard": lambda zstd: zstd.ZstdDecompressor().stream_reader(stream, read_across_frames=True),
        "pyarrow": lambda arrow: arrow.CompressedInputStream(stream, "zstd"),
    }
    for module, opener in openers.items():
        with contextlib.suppress(ImportError):
            return opener(import_module(module))
    raise EnvironmentProblem(
        f"reading {path} needs a library for Zstandard", "Run `pip install zstandard`, or decompress it with `unzstd`"
    )
