"""Tensors of a GGUF file in the layout of a Hugging Face checkpoint.

The operations of the architecture table are inverted: rows are permuted back, transposed matrices transposed again,
fused matrices reassembled, stacked experts split. Nothing is dequantized before it is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

import edgetune_native
from edgetune_converters.architectures import Family, ModelConfig, slots
from edgetune_converters.architectures.operations import Index, View
from edgetune_converters.architectures.table import TensorRow
from edgetune_converters.errors import ArchitectureError
from edgetune_converters.gguf.joined import JoinedFile
from edgetune_converters.gguf.reader import TensorEntry
from edgetune_converters.tensors import ALL, F32, RowIndex, TensorInfo


@lru_cache(maxsize=32)
def _inverse(view: View, rows: int, columns: int) -> Index:
    """The row of the view that holds each source row, -1 for none; of a transposed source, for each transposed row."""
    count, _ = view.shape(rows, columns)
    found = np.full(rows // view.transpose.size * columns if view.transpose else rows, -1, np.intp)
    found[view.source(0, count)] = np.arange(count)
    return found


@dataclass(frozen=True)
class _Part:
    """Rows of a tensor in the file, from `first` on, that are a view of a source [rows, columns].

    `flat`: they are a vector, which is one row in the file and one column in the view.
    """

    stored: NDArray[np.uint8]
    type: str
    width: int
    view: View
    shape: tuple[int, int]
    first: int
    flat: bool

    @property
    def is_whole(self) -> bool:
        """Whether the part is the whole source, unchanged."""
        return not self.view.steps and self.view.transpose is None

    @property
    def held(self) -> int:
        """The number of elements of the source in this part."""
        return math.prod(self.view.shape(*self.shape))

    def decoded(self, rows: RowIndex) -> F32:
        """Return rows of the view in f32, without the constant that was added."""
        count, _ = self.view.shape(*self.shape)
        span = slice(self.first, self.first + count)
        if self.flat:
            whole = edgetune_native.dequantize(np.ascontiguousarray(self.stored), self.type, self.width)
            found: F32 = whole.reshape(-1, 1)[span][rows]
        else:
            found = edgetune_native.dequantize(np.ascontiguousarray(self.stored[span][rows]), self.type, self.width)
        if self.view.add:
            with np.errstate(invalid="ignore"):  # NaN is refused later, with the tensor's name
                found -= np.float32(self.view.add)
        return found

    def fill(self, out: F32, rows: Index, columns: Index) -> None:
        """Write this part's elements of these rows and columns into `out`."""
        inverse = _inverse(self.view, *self.shape)
        if self.view.transpose is None:
            at = inverse[rows]
            out[at >= 0] = self.decoded(at[at >= 0])[:, columns]
            return
        slab, inside = np.divmod(rows, self.view.transpose.size)
        inside = inside - self.view.transpose.first
        mine = (inside >= 0) & (inside < self.view.transpose.count)
        for number in np.unique(slab[mine]):
            here = mine & (slab == number)
            at = inverse[number * self.shape[1] + columns]
            out[np.ix_(here, at >= 0)] = self.decoded(at[at >= 0])[:, inside[here]].T


@dataclass
class AssembledTensor:
    """A tensor of the checkpoint, assembled from all tensors of the file that hold parts of it."""

    info: TensorInfo
    parts: tuple[str, ...] = ()
    sources: list[_Part] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns; a vector is a column."""
        return self.sources[0].shape

    def rows(self, first: int, last: int) -> F32:
        """Return rows first..last of the tensor in f32."""
        return self.read(slice(first, last))

    def read(self, rows: RowIndex, columns: RowIndex = ALL) -> F32:
        """Return some rows and columns of the tensor in f32."""
        first = self.sources[0]
        if len(self.sources) == 1 and first.is_whole:
            return first.decoded(rows)[:, columns]
        numbers, chosen = (_numbers(asked, count) for asked, count in zip((rows, columns), self.shape, strict=True))
        out: F32 = np.empty((len(numbers), len(chosen)), np.float32)
        for source in self.sources:
            source.fill(out, numbers, chosen)
        return out


def _numbers(asked: RowIndex, count: int) -> Index:
    return np.arange(*asked.indices(count)) if isinstance(asked, slice) else asked


class GgufTensors:
    """All tensors of a file under the names of the family's checkpoints.

    `carried` are tensors that a config would give if the file still had one: RoPE factors, by slot. `problems` say what
    cannot be read back.
    """

    def __init__(self, file: JoinedFile, family: Family, config: ModelConfig) -> None:
        self._file = file
        self._family = family
        self._config = config
        self._entries = {entry.name: entry for entry in file.tensors}
        self._paths = {entry.name: part.path for part in file.files for entry in part.tensors}
        self.found: dict[str, AssembledTensor] = {}
        self.carried: list[tuple[str, F32]] = []
        self.problems = [text for row, layer in _places(family, config) for text in self._row(row, layer)]
        self.problems += [text for tensor in self.found.values() for text in _incomplete(tensor)]
        self._carry(family)
        self.problems += [f"{name} has no place in the {family.name} family" for name in sorted(self._entries)]

    def _row(self, row: TensorRow, layer: int | None) -> Iterator[str]:
        """Read the tensors of a row, or yield why they cannot be read."""
        endings = {"bias": row.bias_name, row.part: row.weight} if row.bias else {row.part: row.weight}
        for part, ending in endings.items():
            entry = self._entries.pop(slots.gguf_name(row.slot, layer, part), None)
            if entry is None:
                continue  # a missing tensor is reported when the tensors are matched
            try:
                yield from self._take(row, entry, _Names(row.module, ending, layer), part != row.part)
            except (ArchitectureError, ValueError, TypeError, IndexError) as error:
                yield f"{entry.name}: {error}"

    def _take(self, row: TensorRow, entry: TensorEntry, names: _Names, is_bias: bool) -> Iterator[str]:
        count = row.stacked(self._config) if row.stacked else 1
        shape, views = row.shape(self._config), list(row.views(self._config))
        if is_bias:
            shape = _shape_for_bias(shape, transposed=any(view.transpose for view in views))
            views = [view.for_bias() for view in views]
        flat = is_bias or len(shape) == 1
        source = (math.prod(shape), 1) if flat else (math.prod(shape[:-1]), shape[-1])
        if text := _misfit(entry, views, source, count, flat=flat):
            yield text
            return
        stored = self._file.tensor(entry.name)
        per = len(stored) // count
        for number in range(count):
            name = self._family.stored_name(names.of(number))
            info = TensorInfo(name, entry.type.upper(), shape, self._paths[entry.name], entry.offset, entry.bytes)
            tensor, first = self.found.setdefault(name, AssembledTensor(info)), 0
            for view in views:
                slab = stored[number * per : (number + 1) * per]
                tensor.sources.append(_Part(slab, entry.type, entry.shape[-1], view, source, first, flat))
                first += view.shape(*source)[0]
            tensor.sources[-1].decoded(slice(0, 1))

    def _carry(self, family: Family) -> None:
        """Take the tensors that the config generates; where the read-back config cannot, keep the file's own."""
        for row in family.generated:
            entry = self._entries.get(name := slots.gguf_name(row.slot, None, "weight"))
            if entry is not None and entry.type == "f32" and len(entry.shape) == 1:
                del self._entries[name]
                if row.compute(self._config) is None:
                    self.carried.append((row.slot, self._file.tensor(name).view(np.float32).reshape(-1).copy()))


@dataclass(frozen=True)
class _Names:
    """The names of a row's tensors in a checkpoint."""

    module: str
    ending: str
    layer: int | None

    def of(self, number: int) -> str:
        return self.module.format(layer=self.layer, n=number) + self.ending


def _places(family: Family, config: ModelConfig) -> Iterator[tuple[TensorRow, int | None]]:
    """A row for each slot in each layer that has it; of several ways of storing one, the first.

    Of experts that transformers stores fused, the last, which is the fused one.
    """
    by_slot: dict[tuple[str, str], list[TensorRow]] = {}
    for row in family.tensors:
        by_slot.setdefault((row.slot, row.part), []).append(row)
    for rows in by_slot.values():
        for layer in range(config.layers) if "{layer}" in rows[0].module else [None]:
            ways = reversed(rows) if family.fused_experts else rows
            here = next((row for row in ways if row.when(config, layer or 0)), None)
            if here:
                yield here, layer


def _shape_for_bias(shape: tuple[int, ...], *, transposed: bool) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1]) if transposed else shape[:-1] or shape


def _misfit(
    entry: TensorEntry, views: Sequence[View], source: tuple[int, int], count: int, *, flat: bool
) -> str | None:
    """Why a tensor of the file cannot be `count` times these views of a source, or None."""
    for view in views:
        if text := view.problem(*source):
            return f"{entry.name}: {text}"
    shapes = [view.shape(*source) for view in views]
    held = count * sum(math.prod(shape) for shape in shapes)
    width = {columns for _, columns in shapes}
    if math.prod(entry.shape) == held and (flat or width == {entry.shape[-1]}):
        return None
    return f"{entry.name} has the shape {list(entry.shape)}, which is not that of {held} weights of this model"


def _incomplete(tensor: AssembledTensor) -> Iterator[str]:
    """Report a fused tensor of which the file lacks a part."""
    if sum(source.held for source in tensor.sources) != math.prod(tensor.shape):
        yield f"{tensor.info.name} is not whole: the file lacks some of the tensors that it is made of"
