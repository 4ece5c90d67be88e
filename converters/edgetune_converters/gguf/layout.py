"""Header and tensor offsets of a GGUF file, computed before the first weight is read."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from edgetune_converters.errors import ArtifactError
from edgetune_converters.gguf.types import StorageType
from edgetune_converters.gguf.values import Value, encode, encode_string

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
MAX_NAME_BYTES = 63  # llama.cpp keeps tensor names in 64 bytes, the last one zero


class TensorSpec(NamedTuple):
    """A tensor to be written; `shape` is (rows, columns) or (columns,), as in NumPy."""

    name: str
    shape: tuple[int, ...]
    type: StorageType

    @property
    def bytes(self) -> int:
        """Bytes of the data without padding."""
        return math.prod(self.shape[:-1]) * self.type.row_bytes(self.shape[-1])


class Layout(NamedTuple):
    """`header` includes its padding; `offsets[i]` is the start of tensor i in the file."""

    header: bytes
    offsets: tuple[int, ...]
    size: int


def align(position: int) -> int:
    """Return the next multiple of the alignment."""
    return -(-position // ALIGNMENT) * ALIGNMENT


def lay_out(metadata: Mapping[str, Value], tensors: Sequence[TensorSpec]) -> Layout:
    """Build the header and place the tensors in the given order."""
    return lay_out_encoded(encode_metadata(metadata), tensors)


def encode_metadata(metadata: Mapping[str, Value]) -> dict[str, bytes]:
    """Return the bytes of each key with its value. A large vocabulary takes a while."""
    return {key: encode_string(key) + encode(value) for key, value in metadata.items()}


def lay_out_encoded(metadata: Mapping[str, bytes], tensors: Sequence[TensorSpec]) -> Layout:
    """Return the layout for metadata that `encode_metadata` returned."""
    relative, end = _place(tensors)
    header = b"".join(
        [
            MAGIC,
            struct.pack("<IQQ", VERSION, len(tensors), len(metadata)),
            *metadata.values(),
            *(_info(spec, offset) for spec, offset in zip(tensors, relative, strict=True)),
        ]
    )
    header += bytes(align(len(header)) - len(header))
    return Layout(header, tuple(len(header) + offset for offset in relative), len(header) + end)


def _place(tensors: Sequence[TensorSpec]) -> tuple[list[int], int]:
    """Return offsets relative to the data section, and the end of the data. Every tensor is padded, even the last."""
    offsets, position = [], 0
    for spec in tensors:
        offsets.append(position)
        position = align(position + spec.bytes)
    return offsets, position


def _info(spec: TensorSpec, offset: int) -> bytes:
    if len(spec.name.encode()) > MAX_NAME_BYTES:
        raise ArtifactError(f"the tensor name {spec.name!r} is longer than {MAX_NAME_BYTES} bytes, which GGUF forbids")
    dimensions = spec.shape[::-1]  # GGUF stores the fastest dimension first
    return encode_string(spec.name) + struct.pack(
        f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, spec.type.id, offset
    )
