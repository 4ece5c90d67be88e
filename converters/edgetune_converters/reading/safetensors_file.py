"""Memory-mapped safetensors files: a checked header, and rows of tensors as f32 or as they are stored.

The header is checked before any weight is read: offsets in range, no overlaps, and sizes that agree with dtype and
shape.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.errors import CheckpointError
from edgetune_converters.files.contents import DAMAGED
from edgetune_converters.reading.page_cache import PassingPages
from edgetune_converters.tensors import ALL, F32, FLOAT8, RowIndex, TensorInfo, span, to_f32

_MAX_HEADER = 100 * 1024 * 1024  # the limit of the safetensors format

# dtypes that are read -> the numpy dtype of their bytes
_STORED: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F64": np.dtype("<f8"),
    **dict.fromkeys(("U8", "F8_E8M0", *FLOAT8), np.dtype(np.uint8)),
    **{name: np.dtype(f"<{name[0].lower()}{int(name[1:]) // 8}") for name in ("I8", "I16", "I32", "I64")},
    **{name: np.dtype(f"<u{int(name[1:]) // 8}") for name in ("U16", "U32", "U64")},
}
INTEGERS = ("U8", "I8", "I16", "I32", "I64", "U16", "U32", "U64")
"""The dtypes of integers."""
_SIXTEEN_BIT = ("F16", "BF16")  # dtypes that the kernels take as they are stored
# every dtype of the format -> bytes per element
_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


class SafetensorsFile:
    """One mapped .safetensors file with a checked header.

    Raises CheckpointError for a damaged or truncated file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.size = path.stat().st_size
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else None
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        self.metadata, self.tensors = self._read_header()
        first = min((info.start for info in self.tensors.values()), default=self.size)
        self.pages = PassingPages(path, self._map, self.size, first) if self._map else None
        # reads per tensor during the pass, where not one
        self.planned_reads: Mapping[str, float] = {}

    def _read_header(self) -> tuple[dict[str, str], dict[str, TensorInfo]]:
        """The free metadata and the tensors."""
        return _parse_header(self.path, self._map, self.size)

    def rows(self, info: TensorInfo, rows: RowIndex, columns: RowIndex = ALL) -> F32:
        """Return rows of a tensor as a fresh f32 array [n, columns]; a vector is one column."""
        first, last = span(rows, row_count(info.shape))
        stored = self.raw(info, first, last)
        if not isinstance(rows, slice):
            stored = stored[rows - first]
        stored = stored[:, columns]
        converted = to_f32(stored, info.dtype)
        self.forget(info, rows, columns)
        return converted

    def stored(self, info: TensorInfo, rows: RowIndex, columns: RowIndex = ALL) -> NDArray[Any]:
        """As `rows`, but weights of 16 bits keep their type (bf16 as uint16): a view of the map, or a copy of parts.

        The caller releases the pages of a view with `forget`.
        """
        if info.dtype not in _SIXTEEN_BIT:
            return self.rows(info, rows, columns)
        first, last = span(rows, row_count(info.shape))
        view = self.raw(info, first, last)
        whole = isinstance(columns, slice) and columns == ALL
        if isinstance(rows, slice) and whole:
            return view
        chosen = view if isinstance(rows, slice) else view[rows - first]
        copied = chosen if whole else np.ascontiguousarray(chosen[:, columns])
        self.forget(info, rows, columns)
        return copied

    def integers(self, info: TensorInfo) -> NDArray[np.int64]:
        """Return a tensor of integers in its own shape, as i64."""
        return self.raw(info, 0, row_count(info.shape)).astype(np.int64).reshape(info.shape)

    def raw(self, info: TensorInfo, first: int, last: int) -> NDArray[Any]:
        """Return rows first..last as they are stored: a view of the map, [last-first, columns]."""
        assert self._map is not None
        dtype, columns = _STORED[info.dtype], _column_count(info.shape)
        start = info.start + first * columns * dtype.itemsize
        view = np.frombuffer(self._map, dtype, (last - first) * columns, start)
        return view.reshape(last - first, columns)

    def forget(self, info: TensorInfo, rows: RowIndex, columns: RowIndex = ALL) -> None:
        """Let the system drop the pages of these rows, so that a large model does not count as memory in use."""
        count = row_count(info.shape)
        first, last = span(rows, count)
        width = info.bytes // max(1, count)
        start = (info.start + first * width) // mmap.PAGESIZE * mmap.PAGESIZE
        length = min(self.size, info.start + last * width) - start
        if self._map is None or self.pages is None or length <= 0:
            return
        self._map.madvise(mmap.MADV_DONTNEED, start, length)
        share = (
            _selected(rows, count)
            * _selected(columns, _column_count(info.shape))
            / max(1, count * _column_count(info.shape))
        )
        read = info.bytes * share / self.planned_reads.get(info.name, 1)
        self.pages.passed(info.start + first * width, start + length, read)


def _column_count(shape: tuple[int, ...]) -> int:
    return shape[-1] if len(shape) > 1 else 1


def row_count(shape: tuple[int, ...]) -> int:
    """Return the number of rows when all but the last dimension are rows."""
    return math.prod(shape[:-1]) if len(shape) > 1 else math.prod(shape)


def _selected(rows: RowIndex, count: int) -> int:
    """The number of selected rows or columns, of `count`."""
    return len(range(*rows.indices(count))) if isinstance(rows, slice) else len(rows)


def _parse_header(path: Path, mapped: mmap.mmap | None, size: int) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """The free metadata and the tensors of a safetensors file."""
    header, data = _header(path, mapped, size)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: __metadata__ is not an object", DAMAGED)
    problems: list[str] = []
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        info = _entry(path, name, entry, data)
        if isinstance(info, str):
            problems.append(f"{path.name}: {info}")
        else:
            tensors[name] = info
    problems += _misplaced(path, tensors.values(), data, size) if not problems else []
    if problems:
        raise CheckpointError.of_many(f"faults in {path}", problems, DAMAGED)
    return metadata, tensors


def _header(path: Path, mapped: mmap.mmap | None, size: int) -> tuple[dict[str, Any], int]:
    """The JSON header and the position at which the data starts."""
    if mapped is None or size < 8:
        raise CheckpointError(f"{path} has {size} bytes, too few for a safetensors file", DAMAGED)
    length: int = struct.unpack("<Q", mapped[:8])[0]
    if length > min(size - 8, _MAX_HEADER):
        raise CheckpointError(f"{path} is truncated or not safetensors: its header claims {length} bytes", DAMAGED)
    try:
        header = json.loads(mapped[8 : 8 + length], object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header of {path} is not valid: {error}", DAMAGED) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {path} is not a JSON object", DAMAGED)
    return header, 8 + length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _entry(path: Path, name: str, entry: Any, data: int) -> TensorInfo | str:
    """A checked tensor, or what is wrong with it. Python's integers do not overflow, so products are safe."""
    if not isinstance(entry, dict):
        return f"{name} is not described by an object"
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _SIZES:
        return f"{name} has the unknown dtype {dtype!r}"
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        return f"{name} has a shape or offsets that are not natural numbers"
    if offsets[1] - offsets[0] != math.prod(shape) * _SIZES[dtype]:
        return f"{name} is {dtype} {shape} but takes {offsets[1] - offsets[0]} bytes"
    return TensorInfo(name, dtype, tuple(shape), path, data + offsets[0], offsets[1] - offsets[0])


def _naturals(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(number) is int and 0 <= number < 2**62 for number in numbers)


def _misplaced(path: Path, tensors: Any, data: int, size: int) -> Iterator[str]:
    """Tensors that overlap, leave holes or reach past the end of the file."""
    end = data
    for info in sorted(tensors, key=lambda info: (info.start, info.bytes)):
        if info.start != end:
            kind = "overlaps the tensor before it" if info.start < end else "leaves a hole before it"
            yield f"{path.name}: {info.name} {kind} at byte {info.start}"
        end = info.start + info.bytes
    if end > size:
        yield f"{path.name} is truncated: its tensors need {end} bytes, the file has {size}"
    elif end < size:
        yield f"{path.name} has {size - end} bytes after its last tensor"
