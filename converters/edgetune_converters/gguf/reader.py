"""Read GGUF files that are not trusted: every length is checked against the rest of the file before it is used.

A truncated, damaged or other file raises ArtifactError. Reading never crashes, hangs or allocates more than the size of
the file.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.errors import ArtifactError
from edgetune_converters.gguf.layout import ALIGNMENT, MAGIC
from edgetune_converters.gguf.types import BY_ID, StorageType
from edgetune_converters.gguf.values import STRUCT_CODES, Plain, ValueKind

_VERSIONS = (2, 3)  # version 1 had 32-bit lengths and has not been written since 2023
_MAX_DIMENSIONS = 4
_HINT = "the file is damaged or was not written completely: export it again"


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in the file: `shape` as in NumPy, `offset` from the start of the file, `bytes` without padding."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    bytes: int


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file. `tensor(name)` maps the stored bytes without copying them."""

    path: Path
    size: int
    version: int
    metadata: dict[str, Plain]
    tensors: list[TensorEntry]

    def tensor(self, name: str) -> NDArray[np.uint8]:
        """Return the stored rows of a tensor, uint8 [rows, bytes of a row]. Raises KeyError."""
        entry = next((entry for entry in self.tensors if entry.name == name), None)
        if entry is None:
            raise KeyError(name)
        rows = math.prod(entry.shape[:-1])
        if not entry.bytes:
            return np.empty((rows, 0), np.uint8)
        raw = np.memmap(self.path, np.uint8, "r", entry.offset, (entry.bytes,))
        return raw.reshape(rows, entry.bytes // rows)


def read(path: Path) -> GgufFile:
    """Read and check the header of a file.

    Raises:
        ArtifactError: The file is not a complete GGUF file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise ArtifactError(f"{path} is not a GGUF file", "Give the path of a .gguf file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return _Parser(path, mapped, size).parse()
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error


class _Parser:
    """A cursor over the mapped header."""

    def __init__(self, path: Path, mapped: mmap.mmap, size: int) -> None:
        self._path = path
        self._mapped = mapped
        self._size = size
        self._at = len(MAGIC)

    def parse(self) -> GgufFile:
        version = self._integer("I")
        if version not in _VERSIONS:
            raise ArtifactError(f"{self._path} has GGUF version {version}; versions 2 and 3 are supported", _HINT)
        n_tensors, n_values = self._integer("Q"), self._integer("Q")
        # the shortest key-value is 13 bytes (empty key, u8), the shortest tensor entry 32 (empty name, one dimension)
        self._room(n_values, 13, "metadata entries")
        metadata = self._metadata(n_values)
        self._room(n_tensors, 32, "tensors")
        entries = [self._entry() for _ in range(n_tensors)]
        tensors = self._placed(entries, metadata)
        return GgufFile(self._path, self._size, version, metadata, tensors)

    def _fail(self, what: str) -> ArtifactError:
        return ArtifactError(f"{self._path}: {what}", _HINT)

    def _room(self, count: int, smallest: int, what: str) -> None:
        if count > (self._size - self._at) // smallest:
            raise self._fail(f"the header promises {count} {what}, more than the file has room for")

    def _take(self, length: int) -> bytes:
        if length > self._size - self._at:
            raise self._fail(f"the file ends at byte {self._size} in the middle of its header")
        start, self._at = self._at, self._at + length
        return self._mapped[start : self._at]

    def _integer(self, code: str) -> int:
        number: int = struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]
        return number

    def _text(self, errors: str) -> str:
        raw = self._take(self._integer("Q"))
        try:
            return raw.decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise self._fail("a name in the header is not UTF-8") from error

    def _metadata(self, count: int) -> dict[str, Plain]:
        metadata: dict[str, Plain] = {}
        for _ in range(count):
            key = self._text("strict")
            if key in metadata:
                raise self._fail(f"the metadata key {key!r} occurs twice")
            metadata[key] = self._value(self._kind())
        return metadata

    def _kind(self) -> ValueKind:
        number = self._integer("I")
        try:
            return ValueKind(number)
        except ValueError as error:
            raise self._fail(f"{number} is not a known metadata type") from error

    def _value(self, kind: ValueKind) -> Plain:
        if kind is ValueKind.ARRAY:
            return self._array()
        if kind is ValueKind.STRING:
            return self._text("replace")
        return self._fixed(kind, 1)[0]

    def _array(self) -> Plain:
        element, count = self._kind(), self._integer("Q")
        if element is ValueKind.ARRAY:
            raise self._fail("arrays of arrays are not used in GGUF models")
        if element is ValueKind.STRING:
            self._room(count, 8, "strings")
            return [self._text("replace") for _ in range(count)]
        self._room(count, struct.calcsize("<" + STRUCT_CODES[element]), "array elements")
        return self._fixed(element, count)

    def _fixed(self, kind: ValueKind, count: int) -> list[int]:
        code = f"<{count}{STRUCT_CODES[kind]}"
        return list(struct.unpack(code, self._take(struct.calcsize(code))))

    def _entry(self) -> tuple[str, tuple[int, ...], StorageType, int]:
        name = self._text("strict")
        n_dimensions = self._integer("I")
        if not 1 <= n_dimensions <= _MAX_DIMENSIONS:
            raise self._fail(f"tensor {name!r} has {n_dimensions} dimensions")
        shape = tuple(self._integer("Q") for _ in range(n_dimensions))[::-1]
        storage = BY_ID.get(self._integer("I"))
        if storage is None:
            raise self._fail(f"tensor {name!r} has an unknown storage type")
        if shape[-1] % storage.block:
            raise self._fail(f"tensor {name!r} has rows of {shape[-1]}, not a multiple of the block of {storage.name}")
        return name, shape, storage, self._integer("Q")

    def _placed(
        self, entries: list[tuple[str, tuple[int, ...], StorageType, int]], metadata: dict[str, Plain]
    ) -> list[TensorEntry]:
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise self._fail(f"general.alignment is {alignment!r}, which is not a power of two")
        data = -(-self._at // alignment) * alignment
        placed = [self._place(entry, data, alignment) for entry in entries]
        self._check_overlaps(placed)
        return placed

    def _place(self, entry: tuple[str, tuple[int, ...], StorageType, int], data: int, alignment: int) -> TensorEntry:
        name, shape, storage, offset = entry
        length = math.prod(shape[:-1]) * storage.row_bytes(shape[-1])
        if offset % alignment:
            raise self._fail(f"tensor {name!r} starts at offset {offset}, which is not a multiple of {alignment}")
        if data + offset + length > self._size:
            raise self._fail(f"tensor {name!r} ends at byte {data + offset + length}, the file at {self._size}")
        return TensorEntry(name, shape, storage.name, data + offset, length)

    def _check_overlaps(self, tensors: list[TensorEntry]) -> None:
        names: set[str] = set()
        end = 0
        for tensor in sorted(tensors, key=lambda entry: (entry.offset, entry.bytes)):
            if tensor.name in names:
                raise self._fail(f"the tensor {tensor.name!r} occurs twice")
            if tensor.offset < end:
                raise self._fail(f"the data of tensor {tensor.name!r} overlaps the tensor before it")
            names.add(tensor.name)
            end = tensor.offset + tensor.bytes
