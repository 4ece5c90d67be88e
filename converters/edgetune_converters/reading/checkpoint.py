"""Reading a Hugging Face checkpoint: mapped safetensors, rows as f32, nothing loaded before it is asked for.

The header of each file is checked before any weight is read: offsets in range, no overlaps, and bytes that agree with
dtype and shape. Pickled weights are refused, because opening one can run any code.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.errors import CheckpointError
from edgetune_converters.reading import prequantized
from edgetune_converters.reading.float8 import TABLES
from edgetune_converters.reading.page_cache import PassingPages

F32 = NDArray[np.float32]
Rows = slice | NDArray[np.intp]
ALL = slice(None)

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_MAX_HEADER = 100 * 1024 * 1024  # the limit of the safetensors format
_DAMAGED = "the file is damaged or was not downloaded completely: fetch it again"

# dtypes that hold weights, or what explains them -> the numpy dtype of their bytes
_STORED: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F64": np.dtype("<f8"),
    **dict.fromkeys(("U8", *TABLES), np.dtype(np.uint8)),
    "I8": np.dtype(np.int8),
}
NARROW = ("F16", "BF16")  # dtypes that kernels take as they are stored
# every dtype of the format -> bytes of an element
_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """A tensor on disk: `start` is counted from the beginning of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    bytes: int


class SafetensorsFile:
    """One mapped .safetensors file with a checked header."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.size = path.stat().st_size
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else None
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        self.metadata, self.tensors = _parse_header(path, self._map, self.size)
        first = min((info.start for info in self.tensors.values()), default=self.size)
        self.pages = PassingPages(path, self._map, self.size, first) if self._map else None
        # how often the pass will read a tensor, where not once
        self.planned_reads: Mapping[str, float] = {}

    def rows(self, info: TensorInfo, rows: Rows, columns: Rows = ALL) -> F32:
        """Rows of a tensor in f32, a fresh array [n, columns]; a tensor of one dimension has rows of one column."""
        first, last = _span(rows, _count(info.shape))
        stored = self.raw(info, first, last)
        if not isinstance(rows, slice):
            stored = stored[rows - first]
        stored = stored[:, columns]
        converted = to_f32(stored, info.dtype)
        self.forget(info, rows, columns)
        return converted

    def stored(self, info: TensorInfo, rows: Rows, columns: Rows = ALL) -> NDArray[Any]:
        """As `rows`, but weights of 16 bits stay as they are (bf16 as uint16): a view of the map, or a copy of parts.

        What is left in memory of a view is let go by `forget`.
        """
        if info.dtype not in NARROW:
            return self.rows(info, rows, columns)
        first, last = _span(rows, _count(info.shape))
        view = self.raw(info, first, last)
        whole = isinstance(columns, slice) and columns == ALL
        if isinstance(rows, slice) and whole:
            return view
        chosen = view if isinstance(rows, slice) else view[rows - first]
        copied = chosen if whole else np.ascontiguousarray(chosen[:, columns])
        self.forget(info, rows, columns)
        return copied

    def raw(self, info: TensorInfo, first: int, last: int) -> NDArray[Any]:
        """Rows first..last of a tensor as they are stored, a view of the map of shape [last-first, columns]."""
        assert self._map is not None
        dtype, columns = _STORED[info.dtype], _columns(info.shape)
        start = info.start + first * columns * dtype.itemsize
        view = np.frombuffer(self._map, dtype, (last - first) * columns, start)
        return view.reshape(last - first, columns)

    def forget(self, info: TensorInfo, rows: Rows, columns: Rows = ALL) -> None:
        """Let the system drop the pages of these rows, so that a large model does not count as memory in use."""
        count = _count(info.shape)
        first, last = _span(rows, count)
        width = info.bytes // max(1, count)
        start = (info.start + first * width) // mmap.PAGESIZE * mmap.PAGESIZE
        length = min(self.size, info.start + last * width) - start
        if self._map is None or self.pages is None or length <= 0:
            return
        self._map.madvise(mmap.MADV_DONTNEED, start, length)
        share = _chosen(rows, count) * _chosen(columns, _columns(info.shape)) / max(1, count * _columns(info.shape))
        read = info.bytes * share / self.planned_reads.get(info.name, 1)
        self.pages.passed(info.start + first * width, start + length, read)


class Checkpoint:
    """A model directory: `config` as it stands in config.json, and the tensors of all its safetensors files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _check_directory(path)
        self.config = read_json(path / "config.json")
        prequantized.check_method(path, self.config)
        self._files = {file: SafetensorsFile(file) for file in _weight_files(path)}
        stored = _collect(path, self._files)
        self._decoders = prequantized.decoders(stored, self.config, self._view)
        self.tensors = prequantized.folded(stored, self._decoders)
        # tensors by slot that are written as they are, for bases without the config that gives them
        self.carried: list[tuple[str, F32]] = []

    @property
    def is_quantized(self) -> bool:
        """Whether weights are stored in a coding of few bits, or config.json says so."""
        return bool(self._decoders or self.config.get("quantization_config"))

    def rows(self, tensor: str | TensorInfo, rows: Rows, columns: Rows = ALL) -> F32:
        """Rows of a tensor in f32, a fresh array [n, columns]; a tensor of one dimension has rows of one column."""
        info = self.tensors[tensor] if isinstance(tensor, str) else tensor
        if info.name not in self._decoders:
            return self._files[info.file].rows(info, rows, columns)
        first, last = _span(rows, _count(info.shape))
        decoded = self._decoders[info.name].rows(first, last)
        if info.file in self._files:
            self._files[info.file].forget(info, rows)
        return decoded[:, columns] if isinstance(rows, slice) else decoded[rows - first][:, columns]

    def stored(self, info: TensorInfo, rows: Rows, columns: Rows = ALL) -> NDArray[Any]:
        """As `rows`, but weights that are stored in 16 bits stay as they are: f16, or bf16 as uint16."""
        if info.name in self._decoders:
            return self.rows(info, rows, columns)
        return self._files[info.file].stored(info, rows, columns)

    def forget(self, info: TensorInfo, rows: Rows) -> None:
        """Let the system drop what was read of these rows."""
        if info.file in self._files:
            self._files[info.file].forget(info, rows)

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers in the same dtype."""
        a, b = self.tensors[one], self.tensors[other]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        count = _count(a.shape)
        if one in self._decoders or other in self._decoders:
            blocks = (slice(first, min(first + 1024, count)) for first in range(0, count, 1024))
            return all(np.array_equal(self.rows(one, block), self.rows(other, block)) for block in blocks)
        return all(
            np.array_equal(self._raw(a, first, count), self._raw(b, first, count)) for first in range(0, count, 1024)
        )

    def _raw(self, info: TensorInfo, first: int, count: int) -> NDArray[Any]:
        return self._files[info.file].raw(info, first, min(first + 1024, count))

    def _view(self, info: TensorInfo) -> NDArray[Any]:
        """All elements of a tensor as they are stored, a view of the map."""
        return self._files[info.file].raw(info, 0, _count(info.shape)).reshape(info.shape)

    def expect(self, reads: Mapping[str, float]) -> None:
        """Say how often a pass will read each tensor, by its name."""
        for file in self._files.values():
            file.planned_reads = reads

    def pages(self, path: Path) -> PassingPages | None:
        """Those of a file with weights; None where it is not one."""
        file = self._files.get(path)
        return None if file is None else file.pages

    @property
    def identity_files(self) -> list[Path]:
        """The files by which a base is recognised: config.json and the weights."""
        return sorted([self.path / "config.json", *self._files])

    def identity(self) -> dict[str, str]:
        """SHA-256 of these files, by file name."""
        return {path.name: sha256_of(path) for path in self.identity_files}


def to_f32(stored: NDArray[Any], dtype: str) -> F32:
    """A fresh f32 array of stored weights; bf16 comes as uint16, f8 as uint8; both are exact."""
    if dtype in TABLES:
        widened: F32 = TABLES[dtype][stored]
        return widened
    if dtype != "BF16":
        return stored.astype(np.float32)
    wide = stored.astype(np.uint32)
    np.left_shift(wide, 16, out=wide)
    return wide.view(np.float32)


def widened(rows: NDArray[Any]) -> F32:
    """Rows as `stored` gives them in f32; f32 are the same array."""
    return rows if rows.dtype == np.float32 else to_f32(rows, "BF16" if rows.dtype == np.uint16 else "F16")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Errors: CheckpointError when it is missing, not JSON or not an object."""
    try:
        loaded = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}", _DAMAGED) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} does not hold a JSON object", _DAMAGED)
    return loaded


def _columns(shape: tuple[int, ...]) -> int:
    return shape[-1] if len(shape) > 1 else 1


def _count(shape: tuple[int, ...]) -> int:
    """Rows of a tensor when all but the last dimension are rows."""
    return math.prod(shape[:-1]) if len(shape) > 1 else math.prod(shape)


def _span(rows: Rows, count: int) -> tuple[int, int]:
    """The smallest range of stored rows that holds `rows`."""
    if isinstance(rows, slice):
        first, last, _ = rows.indices(count)
        return first, last
    return int(rows.min()), int(rows.max()) + 1


def _chosen(rows: Rows, count: int) -> int:
    """How many of `count` rows or columns."""
    return len(range(*rows.indices(count))) if isinstance(rows, slice) else len(rows)


def _check_directory(path: Path) -> None:
    if not path.is_dir():
        raise CheckpointError(f"there is no model directory {path}", "Give the path of a Hugging Face model directory")
    if not any(path.iterdir()):
        raise CheckpointError(f"the model directory {path} is empty", "Was the download interrupted?")
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} has no config.json", "A Hugging Face model directory holds config.json beside its weights"
        )


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model directory: those of the index, or the single one."""
    if (path / INDEX_FILE).is_file():
        return _indexed_files(path)
    if (path / SINGLE_FILE).is_file():
        return [path / SINGLE_FILE]
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in {".bin", ".pt", ".pth"})
    if pickles:
        raise CheckpointError(
            f"{path} holds pickled weights ({pickles[0]}); safetensors only, because opening a pickle can run any code",
            "Convert it once: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)",
        )
    raise CheckpointError(f"{path} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there")


def _indexed_files(path: Path) -> list[Path]:
    weight_map = read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{path / INDEX_FILE} has no weight_map from tensor names to file names", _DAMAGED)
    files = [path / name for name in sorted(set(weight_map.values()))]
    strays = [file.name for file in files if file.resolve().parent != path.resolve() and not file.is_symlink()]
    missing = [file.name for file in files if not file.is_file()]
    problems = [f"{name} is outside the model directory" for name in strays]
    problems += [f"{name} is missing" for name in missing if name not in strays]
    if problems or not files:
        raise CheckpointError.of_many(
            f"problems with the shards of {path}", problems or [f"{INDEX_FILE} names no files"], "Fetch the model again"
        )
    return files


def _collect(path: Path, files: Mapping[Path, SafetensorsFile]) -> dict[str, TensorInfo]:
    """All tensors by name; the index, when there is one, must say the same as the shards."""
    tensors: dict[str, TensorInfo] = {}
    problems = []
    for file in files.values():
        for info in file.tensors.values():
            if info.name in tensors:
                problems.append(f"{info.name} is in {tensors[info.name].file.name} and in {info.file.name}")
            tensors[info.name] = info
    if (path / INDEX_FILE).is_file():
        problems += _index_differences(read_json(path / INDEX_FILE)["weight_map"], tensors)
    if problems:
        raise CheckpointError.of_many(f"contradictions in {path}", problems, "Fetch the model again")
    return tensors


def _index_differences(weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    for name in sorted(weight_map.keys() | tensors.keys()):
        said, found = weight_map.get(name), tensors.get(name)
        if found is None:
            yield f"the index puts {name} into {said}, which does not hold it"
        elif said != found.file.name:
            yield f"{name} is in {found.file.name}, the index says {said or 'nothing about it'}"


def _parse_header(path: Path, mapped: mmap.mmap | None, size: int) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """The free metadata and the tensors of a safetensors file."""
    header, data = _header(path, mapped, size)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: __metadata__ is not an object", _DAMAGED)
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
        raise CheckpointError.of_many(f"faults in {path}", problems, _DAMAGED)
    return metadata, tensors


def _header(path: Path, mapped: mmap.mmap | None, size: int) -> tuple[dict[str, Any], int]:
    """The JSON header and the position at which the data starts."""
    if mapped is None or size < 8:
        raise CheckpointError(f"{path} has {size} bytes, too few for a safetensors file", _DAMAGED)
    length: int = struct.unpack("<Q", mapped[:8])[0]
    if length > min(size - 8, _MAX_HEADER):
        raise CheckpointError(f"{path} is truncated or not safetensors: its header claims {length} bytes", _DAMAGED)
    try:
        header = json.loads(mapped[8 : 8 + length], object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header of {path} is not valid: {error}", _DAMAGED) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {path} is not a JSON object", _DAMAGED)
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
