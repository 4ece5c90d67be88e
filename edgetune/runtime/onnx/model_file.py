"""Read and check a graph before ONNX Runtime does: its structure, and the location of each weight.

ONNX Runtime maps the external data of a graph and may crash on a damaged file, so every location is checked against the
files first. Format: onnx.proto and ExternalData.md of the ONNX specification.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from edgetune_converters.errors import ArtifactError
from edgetune_converters.files.contents import sha256_of
from edgetune_converters.gguf import keys
from edgetune_converters.provenance.receipts import Receipt, receipt_path

_DAMAGED = "The file is damaged or was not copied completely: export or download it again"
_UNTRUSTED = "Download the folder from a source that you trust"
QUANTIZED = frozenset(
    ("MatMulNBits", "GatherBlockQuantized", "QMoE", "MatMulBnb4", "DequantizeLinear", "MatMulInteger")
)

# name in TensorProto.DataType -> bits of an element
_BITS = {
    "FLOAT": 32, "UINT8": 8, "INT8": 8, "UINT16": 16, "INT16": 16, "INT32": 32, "INT64": 64, "BOOL": 8, "FLOAT16": 16,
    "DOUBLE": 64, "UINT32": 32, "UINT64": 64, "COMPLEX64": 64, "COMPLEX128": 128, "BFLOAT16": 16, "FLOAT8E4M3FN": 8,
    "FLOAT8E4M3FNUZ": 8, "FLOAT8E5M2": 8, "FLOAT8E5M2FNUZ": 8, "UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4,
    "FLOAT8E8M0": 8, "UINT2": 2, "INT2": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Initializer:
    """A tensor with weights. `file` is None if its data are inside the graph."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    file: Path | None
    offset: int = 0


@dataclass(frozen=True)
class GraphFile:
    """A checked graph. `proto` is the ModelProto, without external data."""

    path: Path
    proto: Any
    tensors: tuple[Initializer, ...]

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of the graph (metadata_props)."""
        return {entry.key: entry.value for entry in self.proto.metadata_props}

    @cached_property
    def nodes(self) -> tuple[Any, ...]:
        """All nodes, including those of subgraphs and functions."""
        functions = (node for function in self.proto.functions for node in function.node)
        return tuple(_with_inner([*self.proto.graph.node, *functions]))

    @property
    def is_quantized(self) -> bool:
        """Whether an operator takes quantized weights."""
        return any(node.op_type in QUANTIZED for node in self.nodes)

    @property
    def data_files(self) -> list[Path]:
        """The files of external data."""
        return sorted({tensor.file for tensor in self.tensors if tensor.file})

    @property
    def size(self) -> int:
        """Bytes of the graph and its data."""
        return sum(file.stat().st_size for file in (self.path, *self.data_files))

    def check_receipt(self, artifact: Path) -> None:
        """Compare the hash of the graph, which is small, with the receipt of `artifact`, if there is one.

        Raises:
            ArtifactError: The graph is not the one of the receipt. One bit in an epsilon changes every answer.
        """
        stated = _receipt_hashes(artifact).get(self.path.name)
        if stated is not None and stated != sha256_of(self.path):
            raise ArtifactError(f"{self.path} has changed: its hash is not the one in its receipt", _DAMAGED)

    def verify(self) -> None:
        """Read all data and compare them with the hash in the graph. Raises ArtifactError if they differ."""
        digest = self.metadata.get(keys.DATA_HASH)
        if digest is None:
            return
        for file in self.data_files:
            if sha256_of(file) != digest:
                raise ArtifactError(f"{file} is not the data that {self.path.name} was written with", _DAMAGED)


def read(path: Path) -> GraphFile:
    """Parse and check a graph. Raises ArtifactError if the file is not a complete, valid ONNX model."""
    proto = _parsed(path)
    locator = _Locator(path)
    tensors = tuple(locator.locate(tensor) for tensor in _initializers(proto))
    model = GraphFile(path, proto, tensors)
    _check_stated_size(model)
    return model


def _parsed(path: Path) -> Any:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        proto = onnx.load_model(str(path), load_external_data=False)
    except (DecodeError, ValueError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is not an ONNX model: {error}", _DAMAGED) from None
    if not proto.ir_version or not proto.graph.node:
        raise ArtifactError(f"{path} is not an ONNX model: it has no graph", _DAMAGED)
    if not _is_text(proto):
        raise ArtifactError(f"{path} has names that are not UTF-8 text", _DAMAGED)
    return proto


def _is_text(message: Any) -> bool:
    """Whether all strings are valid UTF-8: protobuf returns bytes for the others."""
    for field, value in message.ListFields():
        values = value if field.is_repeated else [value]
        if field.type == field.TYPE_STRING and not all(isinstance(text, str) for text in values):
            return False
        if field.type == field.TYPE_MESSAGE and not all(map(_is_text, values)):
            return False
    return True


def _receipt_hashes(artifact: Path) -> dict[str, str]:
    """Return file -> SHA-256 from the receipt of an artifact; empty without a receipt."""
    return Receipt.read(artifact).files if receipt_path(artifact).is_file() else {}


# -- weights -----------------------------------------------------------------------------------------------------------


class _Locator:
    """Finds the data of the tensors of one graph."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[str, tuple[Path, int]] = {}
        folder = path.parent
        self._inside = {folder.resolve(), path.resolve().parent}  # in the hub's cache, both are links

    def locate(self, tensor: Any) -> Initializer:
        """Return a tensor with the checked location of its data."""
        dtype, shape = _dtype(self._path, tensor), tuple(tensor.dims)
        if any(size < 0 for size in shape):
            raise ArtifactError(f"{self._path}: the tensor {tensor.name!r} has the shape {list(shape)}", _DAMAGED)
        size = (math.prod(shape) * _BITS[dtype] + 7) // 8
        if tensor.data_location != tensor.EXTERNAL:
            if tensor.HasField("raw_data") and len(tensor.raw_data) != size:
                raise self._wrong_size(tensor.name, len(tensor.raw_data), size)
            return Initializer(tensor.name, dtype, shape, size, None)
        place = {entry.key: entry.value for entry in tensor.external_data}
        file, available = self._file(place.get("location", ""))
        offset, length = (_number(self._path, tensor.name, place, key) for key in ("offset", "length"))
        offset, length = offset or 0, size if length is None else length
        if length != size:
            raise self._wrong_size(tensor.name, length, size)
        if offset + length > available:
            raise ArtifactError(
                f"{file} has {available} bytes, and the tensor {tensor.name!r} ends at {offset + length}", _DAMAGED
            )
        return Initializer(tensor.name, dtype, shape, size, file, offset)

    def _file(self, location: str) -> tuple[Path, int]:
        """Return a data file and its size. Raises ArtifactError if it is outside the folder of the graph."""
        if location not in self._files:
            file = self._path.parent / location
            if not location or _is_path(location) or file.resolve().parent not in self._inside:
                raise ArtifactError(f"{self._path} points to data outside its folder: {location!r}", _UNTRUSTED)
            if not file.is_file():
                raise ArtifactError(f"{file}, the data of {self._path.name}, is missing", "Download the whole folder")
            self._files[location] = file, file.stat().st_size
        return self._files[location]

    def _wrong_size(self, name: str, found: int, expected: int) -> ArtifactError:
        return ArtifactError(
            f"{self._path}: the tensor {name!r} has {found} bytes, but its shape and type need {expected}", _DAMAGED
        )


def _is_path(location: str) -> bool:
    """Whether a location is more than a plain file name, by the rules of any system."""
    return any("\0" in location or kind(location).name != location for kind in (PurePosixPath, PureWindowsPath))


def _dtype(path: Path, tensor: Any) -> str:
    try:
        name: str = tensor.DataType.Name(tensor.data_type)
    except ValueError:
        name = str(tensor.data_type)
    if name not in _BITS:
        raise ArtifactError(f"{path}: the tensor {tensor.name!r} has the unknown type {name}", _DAMAGED)
    return name


def _number(path: Path, name: str, place: Mapping[str, str], key: str) -> int | None:
    text = place.get(key)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ArtifactError(f"{path}: the tensor {name!r} has the {key} {text!r}", _DAMAGED)
    return int(text)


def _check_stated_size(model: GraphFile) -> None:
    """Compare the size of the data with the one in the graph: a cheap check for data of another export."""
    stated = model.metadata.get(keys.DATA_SIZE)
    found = sum(file.stat().st_size for file in model.data_files)
    if stated is not None and stated != str(found):
        raise ArtifactError(f"{model.path} was written with {stated} bytes of data, but there are {found}", _DAMAGED)


# -- walking -----------------------------------------------------------------------------------------------------------


def _with_inner(nodes: Any) -> Iterator[Any]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _with_inner(graph.node)


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in _with_inner(graph.node):
        for attribute in node.attribute:
            yield from ([attribute.g] if attribute.HasField("g") else [])
            yield from attribute.graphs


def _initializers(proto: Any) -> Iterator[Any]:
    """Yield every tensor of the model that may contain or reference data."""
    for graph in _graphs(proto.graph):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    functions = (node for function in proto.functions for node in function.node)
    for node in _with_inner([*proto.graph.node, *functions]):
        for attribute in node.attribute:
            yield from ([attribute.t] if attribute.HasField("t") else [])
            yield from attribute.tensors
