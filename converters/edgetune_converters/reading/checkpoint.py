"""Hugging Face checkpoint directories: config.json and the tensors of all safetensors files, read on demand.

Pickled weights are refused, because opening a pickle can run any code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.architectures import transposed_matrices
from edgetune_converters.errors import CheckpointError
from edgetune_converters.files.contents import read_json, sha256_of
from edgetune_converters.reading.page_cache import PassingPages
from edgetune_converters.reading.prequantized import methods
from edgetune_converters.reading.prequantized.decoder import WeightDecoder
from edgetune_converters.reading.prequantized.gptq import TransposedWeight
from edgetune_converters.reading.safetensors_file import SafetensorsFile, row_count
from edgetune_converters.reading.weight_files import INDEX_FILE, collect_tensors, find_weight_files
from edgetune_converters.reading.wrapper_names import inner_wrappers, without_inner_wrappers
from edgetune_converters.tensors import ALL, BY_COLUMNS, F32, PACKED, RowIndex, TensorInfo, span


class TensorRowReader(Protocol):
    """Reads rows of tensors on demand, see SafetensorsFile."""

    def rows(self, info: TensorInfo, rows: RowIndex, columns: RowIndex = ALL) -> F32:
        """Return rows in f32."""

    def stored(self, info: TensorInfo, rows: RowIndex, columns: RowIndex = ALL) -> NDArray[Any]:
        """Return rows; weights of 16 bits keep their type."""

    def forget(self, info: TensorInfo, rows: RowIndex, columns: RowIndex = ALL) -> None:
        """Let the system drop the pages of these rows."""


class Checkpoint:
    """A model directory: `config` is config.json, `tensors` those of all its safetensors files.

    Raises CheckpointError for a missing, damaged or pickled checkpoint, or one quantized in an unknown way.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _check_directory(path)
        self.config = read_json(path / "config.json")
        # remarks for the receipt; wrappers of training whose names are in the stored tensor names
        self.notes: list[str] = []
        self._files = {file: SafetensorsFile(file) for file in find_weight_files(path, self.notes)}
        stored = collect_tensors(path, self._files, self.notes)
        self.wrappers: tuple[str, ...] = ()
        stored = self._without_wrappers(stored)
        self.config = methods.with_entry(path, self.config, stored)
        self.has_outdated_quantization = methods.is_outdated_entry(self.config, stored)
        if self.has_outdated_quantization:
            self._drop_quantization_entry()
        methods.check_method(path, self.config)
        self._decoders = self._as_plain(methods.decoders(stored, self.config, self._view))
        self.tensors = methods.fold_parts(stored, self._decoders)
        self.notes += methods.notes(self.config, stored, self._decoders)
        self.zero_biases = methods.zero_biases(self.tensors, self._decoders, self._view)
        # tensors by slot that are written unchanged, for bases whose config does not give them
        self.carried: list[tuple[str, F32]] = []
        self._substitutes: dict[str, TensorRowReader] = {}

    def _as_plain(self, decoders: dict[str, WeightDecoder]) -> dict[str, WeightDecoder]:
        """The decoders with packed weights in the layout of the plain checkpoint, which some families transpose."""
        packed = [name for name, decoder in decoders.items() if decoder.info.dtype in PACKED]
        transposed = transposed_matrices(self.config, packed)
        return {
            name: TransposedWeight(decoder) if name in transposed else decoder for name, decoder in decoders.items()
        }

    def _drop_quantization_entry(self) -> None:
        """Take quantization_config out of `config`, with a note."""
        entry = self.config["quantization_config"]
        method = entry.get("quant_method", "unknown") if isinstance(entry, dict) else "unknown"
        self.config = {key: value for key, value in self.config.items() if key != "quantization_config"}
        self.notes.append(
            f"config.json declares a quantization ({method}), but the weights are not quantized: the entry is ignored"
        )

    def _without_wrappers(self, stored: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
        """The tensors under their own names, where torch.compile, FSDP or the like put a component into them."""
        self.wrappers = wrappers = inner_wrappers(stored)
        if not wrappers:
            return stored
        clean: dict[str, TensorInfo] = {}
        for name, info in stored.items():
            own = without_inner_wrappers(name)
            if own in clean:
                raise CheckpointError(f"{self.path} holds {own} twice, with and without {' or '.join(wrappers)}")
            clean[own] = replace(info, name=own)
        names = " and ".join(repr(name) for name in wrappers)
        self.notes.append(f"the base's tensor names carry {names}, the name of a wrapper around the model; ignored")
        return clean

    def substitute(self, name: str, file: TensorRowReader, info: TensorInfo) -> None:
        """Read the tensor `name` from another file from now on: as the base would hold it after a resize."""
        self.tensors[name] = replace(info, name=name)
        self._substitutes[name] = file

    def set_aside(self, name: str) -> TensorInfo:
        """Return a description with which the tensor `name` is still read after it has been substituted."""
        info = replace(self.tensors[name], name=f"{name} (as stored)")
        if name in self._decoders:
            self._decoders[info.name] = self._decoders[name]
        return info

    def renumber(self, names: Callable[[str], Sequence[str]]) -> None:
        """Give each tensor the names that `names` returns for its own: several are copies."""
        before = self.tensors
        self.tensors = {new: replace(info, name=new) for name, info in before.items() for new in names(name)}
        self._decoders = {new: decoder for name, decoder in self._decoders.items() for new in names(name)}
        self.zero_biases = {new for name in self.zero_biases for new in names(name)}

    @property
    def lacks_index(self) -> bool:
        """Whether the shards have no index, without which transformers does not load them."""
        return len(self._files) > 1 and not (self.path / INDEX_FILE).is_file()

    @property
    def is_quantized(self) -> bool:
        """Whether weights are stored quantized, or config.json declares it."""
        return bool(self._decoders or self.config.get("quantization_config"))

    @property
    def is_packed(self) -> bool:
        """Whether transformers needs the weights dequantized: GPTQ, AWQ and the like, or a GGUF file."""
        return any(decoder.info.dtype in PACKED for decoder in self._decoders.values())

    def rows(self, tensor: str | TensorInfo, rows: RowIndex, columns: RowIndex = ALL) -> F32:
        """Return rows of a tensor as a fresh f32 array [n, columns]; a vector is one column."""
        info = self.tensors[tensor] if isinstance(tensor, str) else tensor
        if info.name in self._substitutes:
            return self._substitutes[info.name].rows(info, rows, columns)
        if info.name not in self._decoders:
            return self._files[info.file].rows(info, rows, columns)
        first, last = span(rows, row_count(info.shape))
        decoded = self._decoders[info.name].rows(first, last)
        self._forget_decoded(info, rows, last)
        return decoded[:, columns] if isinstance(rows, slice) else decoded[rows - first][:, columns]

    def stored(self, info: TensorInfo, rows: RowIndex, columns: RowIndex = ALL) -> NDArray[Any]:
        """As `rows`, but weights of 16 bits keep their type: f16, or bf16 as uint16."""
        if info.name in self._substitutes:
            return self._substitutes[info.name].stored(info, rows, columns)
        if info.name in self._decoders:
            return self.rows(info, rows, columns)
        return self._files[info.file].stored(info, rows, columns)

    def _forget_decoded(self, info: TensorInfo, rows: RowIndex, last: int) -> None:
        """Drop the pages of decoded rows; those of a weight by columns after its last row, which needs all of them."""
        if info.file in self._files and (info.dtype not in BY_COLUMNS or last == row_count(info.shape)):
            self._files[info.file].forget(info, ALL if info.dtype in BY_COLUMNS else rows)

    def forget(self, info: TensorInfo, rows: RowIndex) -> None:
        """Let the system drop the pages of these rows."""
        file = self._substitutes.get(info.name) or self._files.get(info.file)
        if file is not None:
            file.forget(info, rows)

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers in the same dtype."""
        a, b = self.tensors[one], self.tensors[other]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        count = row_count(a.shape)
        if not self._decoders.keys().isdisjoint((one, other)) or not self._substitutes.keys().isdisjoint((one, other)):
            blocks = (slice(first, min(first + 1024, count)) for first in range(0, count, 1024))
            return all(np.array_equal(self.rows(one, block), self.rows(other, block)) for block in blocks)
        return all(
            np.array_equal(self._raw(a, first, count), self._raw(b, first, count)) for first in range(0, count, 1024)
        )

    def _raw(self, info: TensorInfo, first: int, count: int) -> NDArray[Any]:
        return self._files[info.file].raw(info, first, min(first + 1024, count))

    def _view(self, info: TensorInfo) -> NDArray[Any]:
        """All elements of a tensor as they are stored, a view of the map."""
        return self._files[info.file].raw(info, 0, row_count(info.shape)).reshape(info.shape)

    def expect(self, reads: Mapping[str, float]) -> None:
        """Set how often a pass will read each tensor, by name."""
        for file in self._files.values():
            file.planned_reads = reads

    def pages(self, path: Path) -> PassingPages | None:
        """Return the pages of a weights file, None for another file."""
        file = self._files.get(path)
        return None if file is None else file.pages

    @property
    def identity_files(self) -> list[Path]:
        """The files that identify a base: config.json and the weights."""
        return sorted([self.path / "config.json", *self._files])

    def identity(self) -> dict[str, str]:
        """Return the SHA-256 of the identity files, by file name."""
        return {path.name: sha256_of(path) for path in self.identity_files}


def _check_directory(path: Path) -> None:
    if not path.is_dir():
        raise CheckpointError(f"there is no model directory {path}", "Give the path of a Hugging Face model directory")
    if not any(path.iterdir()):
        raise CheckpointError(f"the model directory {path} is empty", "Was the download interrupted?")
    if not (path / "config.json").is_file() and (path / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{path} holds an adapter, not a model",
            f"Give it with --adapter {path}, and the model it was trained on with --base",
        )
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} has no config.json", "A Hugging Face model directory holds config.json and the weights"
        )
