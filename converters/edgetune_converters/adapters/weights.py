"""The weights of an adapter: one safetensors file, several shards, or the file of torch.save that older trainers write.

A file of torch.save holds a pickle, which can run any code when it is opened as such. Here only its description of
tensors is read: any other object in it is refused, and nothing of torch is needed.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.adapters.mlx import MLX_FILE, MlxWeights
from edgetune_converters.errors import CheckpointError
from edgetune_converters.files.contents import DAMAGED
from edgetune_converters.reading.checkpoint import TensorRowReader
from edgetune_converters.reading.safetensors_file import SafetensorsFile
from edgetune_converters.tensors import ALL, F32, RowIndex, TensorInfo

_MAX_PICKLE = 64 * 1024 * 1024  # bytes of the description; that of an adapter has some hundred kilobytes
_LOCAL_HEADER = 30  # bytes before the name in the header of a file in a zip archive
_HINT = "Save it again with PEFT, which writes safetensors: PeftModel.from_pretrained(BASE, DIR).save_pretrained(DIR)"


class AdapterWeights(TensorRowReader, Protocol):
    """Tensors by name, and their rows on demand."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name."""

    def integers(self, info: TensorInfo) -> NDArray[np.int64]:
        """Return a tensor of integers in its own shape."""


def open_weights(files: Sequence[Path]) -> AdapterWeights:
    """Open the files of an adapter. Raises CheckpointError for a damaged one, or a tensor in two of them."""
    if files[0].name == MLX_FILE:
        return MlxWeights(files[0])
    opened = [TorchFile(file) if file.suffix == ".bin" else SafetensorsFile(file) for file in files]
    return opened[0] if len(opened) == 1 else _Shards(opened)


class _Shards:
    """Several files as one."""

    def __init__(self, files: Sequence[SafetensorsFile]) -> None:
        self._files = {file.path: file for file in files}
        self.tensors: dict[str, TensorInfo] = {}
        for file in files:
            for name, info in file.tensors.items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"{name} is in {self.tensors[name].file.name} and in {info.file.name}", DAMAGED
                    )
                self.tensors[name] = info

    def rows(self, info: TensorInfo, rows: RowIndex, columns: RowIndex = ALL) -> F32:
        return self._files[info.file].rows(info, rows, columns)

    def stored(self, info: TensorInfo, rows: RowIndex, columns: RowIndex = ALL) -> NDArray[Any]:
        return self._files[info.file].stored(info, rows, columns)

    def forget(self, info: TensorInfo, rows: RowIndex, columns: RowIndex = ALL) -> None:
        self._files[info.file].forget(info, rows, columns)

    def integers(self, info: TensorInfo) -> NDArray[np.int64]:
        return self._files[info.file].integers(info)


# -- torch.save --------------------------------------------------------------------------------------------------------


class TorchFile(SafetensorsFile):
    """A file of torch.save (a zip archive) that holds tensors by name. Raises CheckpointError for anything else."""

    def _read_header(self) -> tuple[dict[str, str], dict[str, TensorInfo]]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                return {}, self._described(archive)
        except zipfile.BadZipFile:
            raise CheckpointError(f"{self.path} is not a file of torch.save since PyTorch 1.6", _HINT) from None
        except (pickle.UnpicklingError, ValueError, TypeError, KeyError, EOFError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{self.path} cannot be read without running its code: {error}", _HINT) from error

    def _described(self, archive: zipfile.ZipFile) -> dict[str, TensorInfo]:
        description = next((entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")), None)
        if description is None or description.file_size > _MAX_PICKLE:
            raise ValueError("it has no description of tensors of a usual size")
        found = _DescriptionReader(archive.read(description)).load()
        if not isinstance(found, dict):
            raise TypeError(f"it holds {type(found).__name__}, not tensors by name")
        if isinstance(found.get("state_dict"), dict):
            found = found["state_dict"]
        root = description.filename.removesuffix("data.pkl")
        return {str(name): self._placed(str(name), tensor, archive, root) for name, tensor in found.items()}

    def _placed(self, name: str, tensor: Any, archive: zipfile.ZipFile, root: str) -> TensorInfo:
        """A tensor with its place in the file."""
        if not isinstance(tensor, _Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}, not a tensor")
        entry = archive.getinfo(f"{root}data/{tensor.storage.key}")
        if entry.compress_type != zipfile.ZIP_STORED or self._map is None:
            raise ValueError(f"{name} is compressed")
        if tensor.stride != _contiguous(tensor.shape):
            raise ValueError(f"{name} is not stored row by row")
        size = tensor.storage.itemsize
        header = self._map[entry.header_offset : entry.header_offset + _LOCAL_HEADER]
        own = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = entry.header_offset + _LOCAL_HEADER + own + tensor.offset * size
        count = math.prod(tensor.shape) * size
        if tensor.offset * size + count > entry.file_size or start + count > self.size:
            raise ValueError(f"{name} reaches past the end of its data")
        return TensorInfo(name, tensor.storage.dtype, tensor.shape, self.path, start, count)


class _Storage(NamedTuple):
    key: str
    dtype: str
    itemsize: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


# class of the storage -> dtype of safetensors and bytes per element
_STORAGES: Mapping[str, tuple[str, int]] = {
    "FloatStorage": ("F32", 4),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "DoubleStorage": ("F64", 8),
}


def _rebuilt(storage: _Storage, offset: int, shape: Sequence[int], stride: Sequence[int], *rest: Any) -> _Tensor:
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a tensor is not described by natural numbers")
    return _Tensor(storage, offset, tuple(shape), tuple(stride))


def _parameter(data: _Tensor, *rest: Any) -> _Tensor:
    return data


_FUNCTIONS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}


class _DescriptionReader(pickle.Unpickler):
    """Reads the description of tensors. No object of the file itself is made, and none of its code is run."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return name
        found = _FUNCTIONS.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, _ = pid
        if kind != "storage" or storage not in _STORAGES:
            raise pickle.UnpicklingError(f"it refers to {kind!r}")
        return _Storage(str(key), *_STORAGES[storage])


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for length in reversed(shape[1:]):
        strides.append(strides[-1] * length)
    return tuple(reversed(strides)) if shape else ()
