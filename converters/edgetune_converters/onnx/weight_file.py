"""The file of weights beside an ONNX graph, written in blocks as the pass delivers them.

The place of every array is known before the pass. A tensor of the pass may be a part of several weights, and a weight
may be made of the rows of several tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.errors import ArtifactError
from edgetune_converters.files.region_file import Region, RegionFile
from edgetune_converters.merging.stream import MergedTensor, RowBlock
from edgetune_converters.onnx.layout import ExternalArray, WeightLayout, WeightPart
from edgetune_converters.onnx.model import DecoderGraph, uses_by_source
from edgetune_converters.onnx.storage import Floats
from edgetune_converters.quantization.imatrix import ImportanceMatrix
from edgetune_converters.tensors import F32


class EncodedBlock(NamedTuple):
    """A block as it is stored."""

    number: int
    """Index of its tensor among all tensors of the model."""
    rows: int
    arrays: Sequence[Sequence[NDArray[np.uint8]]]
    """For each weight that the tensor is a part of, the rows of each array."""


class WeightEncoder:
    """Encodes blocks of the tensors that the graph uses."""

    def __init__(
        self, graph: DecoderGraph, tensors: Sequence[MergedTensor], importance: ImportanceMatrix | None = None
    ) -> None:
        self.uses = uses_by_source(graph.placed)
        self._numbers = sorted(self.uses)
        self.tensors = [tensors[number] for number in self._numbers]
        self._importance = importance

    def encode(self, index: int, block: RowBlock, threads: int) -> EncodedBlock:
        """Encode a block of `tensors[index]` for every weight that it is a part of."""
        number = self._numbers[index]
        weights = [layout for layout, _ in self.uses[number]]
        shape = weights[0].weight.shape
        rows = block.rows.reshape(-1, shape[-1] if len(shape) > 1 else block.rows.size)
        count = len(rows) if len(shape) > 1 else rows.size
        pieces = self._weighted(index, block.first, rows)
        return EncodedBlock(number, count, [_encode(layout, pieces, threads) for layout in weights])

    def quantized(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Yield the GGUF name (the key of the importance matrix), shape and storage type of each quantized tensor."""
        for number, tensor in zip(self._numbers, self.tensors, strict=True):
            storage = self.uses[number][0][0].storage
            if not isinstance(storage, Floats):
                yield tensor.gguf_name, tensor.shape, storage.name

    def _weighted(self, index: int, first: int, rows: NDArray[Any]) -> list[tuple[NDArray[Any], F32 | None]]:
        """Return rows with the importance weights of their columns, one piece for each expert."""
        tensor = self.tensors[index]
        if self._importance is None or len(tensor.shape) < 2:
            return [(rows, None)]
        return list(self._importance.pieces(tensor.gguf_name, tensor.shape, first, rows))


class WeightFile:
    """The file being written. `close` may be called twice."""

    def __init__(
        self, path: Path, graph: DecoderGraph, uses: Mapping[int, Sequence[tuple[WeightLayout, WeightPart]]]
    ) -> None:
        """Create the file. `uses` are the weights that each tensor is a part of."""
        self._path = path
        self._uses = uses
        self._written: dict[int, int] = {}  # rows by tensor
        self._tables = graph.table_rows()
        regions = (Region(array.offset, array.spec.bytes) for array in graph.arrays)
        self._file = RegionFile(path, graph.size, regions)

    def append(self, block: EncodedBlock) -> None:
        """Write a block, and a few rows of the rotary tables: the writing thread has time to compute them."""
        done = self._written.get(block.number, 0)
        self._written[block.number] = done + block.rows
        for (layout, part), arrays in zip(self._uses[block.number], block.arrays, strict=True):
            if done + block.rows > part.rows:
                raise ArtifactError(f"{self._path}: more rows of {layout.weight.name} than planned")
            for values, array in zip(arrays, layout.arrays, strict=True):
                row_bytes = array.spec.bytes // layout.weight.rows
                data = np.ascontiguousarray(values).reshape(block.rows, row_bytes)
                for run in _runs(layout, part, done, block.rows):
                    rows = data[run.block_row : run.block_row + run.length]
                    self._file.write(array.offset, rows, array.offset + run.weight_row * row_bytes, part.step)
        self._write_table(next(self._tables, None))

    def finish(self) -> str:
        """Write the rest of the tables, force the file to disk and return its SHA-256.

        Raises:
            ArtifactError: A tensor is not complete.
        """
        if self._written != {number: used_by[0][1].rows for number, used_by in self._uses.items()}:
            raise ArtifactError(f"{self._path}: not all tensors were written")
        for rows in self._tables:
            self._write_table(rows)
        digest = self._file.finish()
        self.close()
        return digest

    def close(self) -> None:
        """Stop hashing and close the file."""
        self._file.close()

    def _write_table(self, rows: tuple[ExternalArray, int, F32] | None) -> None:
        if rows is not None:
            array, first, values = rows
            data = np.ascontiguousarray(values).view(np.uint8)
            self._file.write(array.offset, data, array.offset + first * data.shape[1])


def _encode(
    layout: WeightLayout, pieces: Sequence[tuple[NDArray[Any], F32 | None]], threads: int
) -> Sequence[NDArray[np.uint8]]:
    """Return rows as each array of a weight stores them."""
    encoded = [layout.storage.store(rows, layout.weight.name, threads, weights) for rows, weights in pieces]
    return encoded[0] if len(encoded) == 1 else [np.concatenate(arrays) for arrays in zip(*encoded, strict=True)]


class _Run(NamedTuple):
    """Rows with one destination: `length` rows from row `block_row` of a block to row `weight_row` of a weight."""

    block_row: int
    weight_row: int
    length: int


def _runs(layout: WeightLayout, part: WeightPart, done: int, count: int) -> list[_Run]:
    """Return where rows done..done+count of a tensor go. Each expert has its own rows of every part."""
    if len(layout.weight.shape) < 3:
        return [_Run(0, part.first + done, count)]
    part_rows, expert_rows = part.source.shape[-2], layout.weight.shape[-2]
    runs, row = [], done
    while row < done + count:
        expert, inside = divmod(row, part_rows)
        length = min(part_rows - inside, done + count - row)
        runs.append(_Run(row - done, expert * expert_rows + part.first + inside * part.step, length))
        row += length
    return runs
