"""A merged model as a directory that ONNX Runtime opens: a small graph, its weights beside it, tokenizer and config.

Where each array lies in the file of weights is known before the pass, so blocks are written as they come. The graph is
written last, and the directory is given its name when it is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import onnx
from numpy.typing import NDArray

from edgetune_converters.errors import ArtifactError
from edgetune_converters.files import directory
from edgetune_converters.files.contents import sha256_of
from edgetune_converters.files.directory import CompanionFiles
from edgetune_converters.files.region_file import Region, RegionFile
from edgetune_converters.gguf import keys
from edgetune_converters.merging.stream import MergedTensor, RowBlock
from edgetune_converters.onnx.genai import DecoderSizes, genai_config
from edgetune_converters.onnx.layout import ExternalArray, WeightLayout, WeightPart
from edgetune_converters.onnx.model import DATA_FILE, DecoderGraph, uses_by_source
from edgetune_converters.onnx.storage import Floats
from edgetune_converters.outputs.base import StreamTensor, Summary
from edgetune_converters.provenance.hashing import InputHashes
from edgetune_converters.provenance.receipts import combined_hash, tool_versions
from edgetune_converters.quantization.imatrix import ImportanceMatrix
from edgetune_converters.tensors import F32
from edgetune_converters.tokenizers.special import SpecialTokenIds

GRAPH_FILE = "model.onnx"
CONFIG_FILE = "genai_config.json"


class EncodedBlock(NamedTuple):
    """A block as it is written: the number of its tensor, its rows, and the bytes for each array of each weight."""

    number: int
    rows: int
    arrays: Sequence[Sequence[NDArray[np.uint8]]]


class OnnxOutput:
    """The directory of one file type. `proof` are the keys of the metadata that do not depend on the type."""

    def __init__(
        self,
        path: Path,
        model: DecoderGraph,
        tensors: Sequence[MergedTensor],
        documents: CompanionFiles,
        proof: Mapping[str, str],
        ends: SpecialTokenIds,
        importance: ImportanceMatrix | None = None,
        extra: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._extra = extra
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._model = model
        self._documents = documents
        self._proof = dict(proof)
        self._ends = ends
        directory.check_tokenizer(documents.tokenizer)
        self._graph = model.graph(tool_versions()["edgetune"])
        self._uses = uses_by_source(model.placed)
        self._numbers = sorted(self._uses)  # of the tensors that are a part of the graph
        self._tensors = [tensors[number] for number in self._numbers]
        self._importance = importance
        self._notes = [*ends.notes, *([] if importance is None else importance.check(self._quantized()))]
        self._written: dict[int, int] = {}  # rows of each tensor
        self._computed = model.computed()
        self._file: RegionFile | None = None
        self._hashes: dict[str, str] = {}
        self._published = False

    @property
    def path(self) -> Path:
        """The directory."""
        return self._path

    @property
    def tensors(self) -> Sequence[StreamTensor]:
        """Those that are a part of the graph."""
        return self._tensors

    @property
    def size(self) -> int:
        """Bytes of the weights and the graph."""
        size: int = self._graph.ByteSize()
        return self._model.size + size

    def __enter__(self) -> Self:
        if self._partial.is_dir():  # of a pass that was killed
            shutil.rmtree(self._partial)
        self._partial.mkdir(parents=True)
        regions = (Region(array.offset, array.form.bytes) for array in self._model.arrays)
        self._file = RegionFile(self._partial / DATA_FILE, self._model.size, regions)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if not self._published:
            shutil.rmtree(self._partial, ignore_errors=True)

    def convert(self, index: int, block: RowBlock, threads: int) -> Any:
        """A block of tensor `index` of those taken, in the storage of its weight."""
        number = self._numbers[index]
        taking = [placed for placed, _ in self._uses[number]]
        shape = taking[0].weight.shape
        rows = block.rows.reshape(-1, shape[-1] if len(shape) > 1 else block.rows.size)
        count = len(rows) if len(shape) > 1 else rows.size
        pieces = self._weighted(index, block.first, rows)
        return EncodedBlock(number, count, [_stored(placed, pieces, threads) for placed in taking])

    def append(self, rows: Any) -> None:
        """Write what `convert` gave, and a piece of the tables: this thread has time."""
        assert self._file is not None
        number, count, stored = rows
        done = self._written.get(number, 0)
        self._written[number] = done + count
        for (placed, part), arrays in zip(self._uses[number], stored, strict=True):
            if done + count > part.rows:
                raise ArtifactError(f"{self._partial}: more rows of {placed.weight.name} than the plan says")
            for values, array in zip(arrays, placed.arrays, strict=True):
                per_row = array.form.bytes // placed.weight.rows
                data = np.ascontiguousarray(values).reshape(count, per_row)
                for run in _runs(placed, part, done, count):
                    own = data[run.block : run.block + run.many]
                    self._file.write(array.offset, own, array.offset + run.row * per_row, part.step)
        self._write_table(next(self._computed, None))

    def _weighted(self, index: int, first: int, rows: NDArray[Any]) -> list[tuple[NDArray[Any], F32 | None]]:
        """The rows with what the importance matrix says of their columns: a piece for each expert."""
        tensor = self._tensors[index]
        if self._importance is None or len(tensor.shape) < 2:
            return [(rows, None)]
        return list(self._importance.pieces(tensor.gguf_name, tensor.shape, first, rows))

    def _quantized(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Name (as llama.cpp has it, and so the importance matrix), shape and type of all that is stored in codes."""
        for number, tensor in zip(self._numbers, self._tensors, strict=True):
            storage = self._uses[number][0][0].storage
            if not isinstance(storage, Floats):
                yield tensor.gguf_name, tensor.shape, storage.name

    def finish(self, identity: InputHashes) -> None:
        """Write tables, graph and documents. Errors: ArtifactError when a tensor is not complete."""
        wanted = {number: using[0][1].rows for number, using in self._uses.items()}
        if self._written != wanted:
            raise ArtifactError(f"{self._partial}: not all tensors were written")
        assert self._file is not None
        for piece in self._computed:
            self._write_table(piece)
        self._hashes[DATA_FILE] = self._file.finish()
        self._file.close()
        self._proof |= {keys.BASE_HASH: identity.base_hash}
        self._write_graph()
        directory.copy_tokenizer(self._documents, self._partial)
        directory.write_json(self._partial / CONFIG_FILE, genai_config(DecoderSizes.of(self._model), self._ends))

    def verify(self) -> None:
        """Read the graph back. Errors: ArtifactError."""
        check_graph(self._partial / GRAPH_FILE, whole=self._model.settings.portable)

    def hash_files(self) -> None:
        """Of the data the hash was taken while it was written."""
        for path in sorted(self._partial.iterdir()):
            if path.name not in self._hashes:
                self._hashes[path.name] = sha256_of(path)

    def publish(self) -> Summary:
        """Rename the directory; one that was exported before gives way."""
        check_replaceable(self._path)
        directory.replace(self._partial, self._path)
        self._published = True
        plan = self._model.plan
        return Summary(
            artifact=self._path,
            sha256=combined_hash(self._hashes),
            size=self.size,
            format="onnx",
            recipe=plan.recipe.name,
            types=plan.bytes_by_type,
            tensors={row.name: row.type for row in plan.rows},
            weights=plan.weights,
            bits_per_weight=round(plan.bits_per_weight, 4),
            fallback_share=round(plan.fallback_share, 4),
            files=dict(sorted(self._hashes.items())),
            notes=tuple(self._notes),
            type_search=None if self._model.settings.type_search is None else dict(self._model.settings.type_search),
            imatrix=None if self._importance is None else self._importance.receipt_entry,
        )

    def _write_table(self, piece: tuple[ExternalArray, int, F32] | None) -> None:
        if piece is None:
            return
        assert self._file is not None
        array, first, values = piece
        data = np.ascontiguousarray(values).view(np.uint8)
        self._file.write(array.offset, data, array.offset + first * data.shape[1])

    def _write_graph(self) -> None:
        plan = self._model.plan
        own = {
            keys.RECIPE: plan.recipe.name,
            keys.CACHE: "in place" if self._model.in_place else "grows",
            keys.DATA_SIZE: str(self._model.size),
            keys.DATA_HASH: self._hashes[DATA_FILE],
        }
        receipt = {
            **self._proof, **own, "bits_per_weight": round(plan.bits_per_weight, 4), "types": plan.bytes_by_type,
        }  # fmt: skip
        stated = {**self._extra, **self._proof, **own, keys.RECEIPT: json.dumps(receipt, ensure_ascii=False)}
        onnx.helper.set_model_props(self._graph, stated)
        (self._partial / GRAPH_FILE).write_bytes(self._graph.SerializeToString())


def _stored(
    placed: WeightLayout, pieces: Sequence[tuple[NDArray[Any], F32 | None]], threads: int
) -> Sequence[NDArray[Any]]:
    """Rows as each array of a weight holds them."""
    made = [placed.storage.store(rows, placed.weight.name, threads, weights) for rows, weights in pieces]
    return made[0] if len(made) == 1 else [np.concatenate(arrays) for arrays in zip(*made, strict=True)]


class _Run(NamedTuple):
    """Rows that go to one place: from row `block` of a block to row `row` of the weight, as `many`."""

    block: int
    row: int
    many: int


def _runs(placed: WeightLayout, part: WeightPart, done: int, count: int) -> list[_Run]:
    """Where rows done..done+count of a tensor go. Of experts, each has its rows of every part."""
    if len(placed.weight.shape) < 3:
        return [_Run(0, part.first + done, count)]
    own, whole = part.source.shape[-2], placed.weight.shape[-2]
    runs, row = [], done
    while row < done + count:
        expert, inside = divmod(row, own)
        number = min(own - inside, done + count - row)
        runs.append(_Run(row - done, expert * whole + part.first + inside * part.step, number))
        row += number
    return runs


def check_replaceable(path: Path) -> None:
    """Errors: EdgetuneError when `path` is something that an export must not remove."""
    directory.check_replaceable(path, "an ONNX model", _is_exported)


def _is_exported(path: Path) -> bool:
    """Whether the graph says so itself: a pass that was killed may have left no receipt."""
    try:
        graph = onnx.load(path / GRAPH_FILE, load_external_data=False)
    except Exception:  # noqa: BLE001 - protobuf has many ways to say that a file is none of its own
        return False
    return any(entry.key == keys.VERSION for entry in graph.metadata_props)


def check_graph(path: Path, *, whole: bool) -> None:
    """Errors: ArtifactError.

    `whole`: shapes and types too, which the checker cannot infer through operators that it does not know.
    """
    try:
        onnx.checker.check_model(str(path), full_check=whole)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ArtifactError(f"{path} is not a valid ONNX model: {error}") from error
