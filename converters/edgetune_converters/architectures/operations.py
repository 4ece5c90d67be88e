"""The closed set of operations on a tensor between a checkpoint and an output file.

`Take` and `RopePermute` map output rows to source rows, `transpose` transposes groups of source rows, `add` adds a
constant, `unit` scales every row to length 1. The same view applies to the base and to the adapter's delta. A view can
be evaluated for any range of rows, so that the stream stays in blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.tensors import Read, RowIndex, widened

Index = NDArray[np.intp]


@dataclass(frozen=True)
class Take:
    """From each group of `size` rows, take `count` rows from `first` on: a part of a fused tensor."""

    size: int
    first: int
    count: int

    def problem(self, rows: int) -> str | None:
        """Return why a source with this number of rows does not fit, or None."""
        return f"{rows} rows are not whole groups of {self.size}" if rows % self.size else None

    def rows(self, rows: int) -> int:
        """Return the number of rows that remain."""
        return rows // self.size * self.count

    def source(self, rows: Index) -> Index:
        """Return the source row of each output row."""
        group, inside = np.divmod(rows, self.count)
        found: Index = group * self.size + self.first + inside
        return found


@dataclass(frozen=True)
class RopePermute:
    """Make the two values of each rotated pair neighbors, as llama.cpp's "llama" architecture needs them.

    Hugging Face keeps them half a head apart: output row 2*i+p of a head is its source row p*head_dim/2+i.
    """

    head_dim: int

    def problem(self, rows: int) -> str | None:
        """Return why a source with this number of rows does not fit, or None."""
        if self.head_dim % 2 or rows % self.head_dim:
            return f"{rows} rows are not whole heads of an even size ({self.head_dim})"
        return None

    def rows(self, rows: int) -> int:
        """Return the number of rows that remain: all."""
        return rows

    def source(self, rows: Index) -> Index:
        """Return the source row of each output row."""
        head, inside = np.divmod(rows, self.head_dim)
        pair, half = np.divmod(inside, 2)
        found: Index = head * self.head_dim + half * (self.head_dim // 2) + pair
        return found


Step = Take | RopePermute


@dataclass(frozen=True)
class View:
    """How an output tensor reads its source: transpose, then the row steps in order, then `add` and `unit`.

    `transpose` takes groups of source rows as `Take` does and transposes each; a transposed group has as many rows as
    the tensor has columns. A bias is not transposed, but follows the same steps.
    """

    steps: tuple[Step, ...] = ()
    transpose: Take | None = None
    add: float = 0.0
    unit: bool = False

    def for_bias(self) -> View:
        """Return the view of the bias that belongs to a weight with this view."""
        return View(self.steps)

    def problem(self, rows: int, columns: int) -> str | None:
        """Return why a source of this shape does not fit, or None."""
        if self.transpose and (text := self.transpose.problem(rows)):
            return text
        count = self._transposed_rows(rows, columns)
        for step in self.steps:
            if text := step.problem(count):
                return text
            count = step.rows(count)
        return None

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Return rows and columns of the view of a source."""
        count = self._transposed_rows(rows, columns)
        for step in self.steps:
            count = step.rows(count)
        return count, self.transpose.count if self.transpose else columns

    def read(self, read: Read, columns: int, first: int, last: int) -> NDArray[Any]:
        """Return rows first..last of the view.

        `read` reads rows and columns of the source, which has `columns` columns.
        """
        rows = self.source(first, last)
        if self.transpose is None:
            return read(rows, slice(None))
        return np.concatenate(list(self._slabs(self.transpose, read, columns, rows)))

    def source(self, first: int, last: int) -> RowIndex:
        """Return the source rows of rows first..last of the view; with `transpose`, rows of the transposed groups."""
        if not self.steps:
            return slice(first, last)
        rows: Index = np.arange(first, last)
        for step in reversed(self.steps):
            rows = step.source(rows)
        return rows

    @property
    def copies(self) -> bool:
        """Whether rows of the view are rows of the source, unchanged and in the same order."""
        return not (self.steps or self.transpose)

    def finalize(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Return merged rows after `add` and `unit`, in f32 where one of them applies. Deltas are not finalized."""
        if not (self.add or self.unit):
            return rows
        rows = widened(rows)
        if self.add:
            rows += np.float32(self.add)
        if self.unit:
            # as torch.nn.functional.normalize, which leaves rows of zeros unchanged
            rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-12))
        return rows

    def _transposed_rows(self, rows: int, columns: int) -> int:
        return rows // self.transpose.size * columns if self.transpose else rows

    @staticmethod
    def _slabs(groups: Take, read: Read, columns: int, rows: RowIndex) -> Iterator[NDArray[Any]]:
        numbers = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        slab, column = np.divmod(numbers, columns)
        for number in np.unique(slab):
            start = int(number) * groups.size + groups.first
            yield np.ascontiguousarray(read(slice(start, start + groups.count), column[slab == number]).T)


COPY = View()
