"""Transforms of the matrices of single experts, as one of the parameter that holds all experts of a layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.adapters.change import Apply
from edgetune_converters.adapters.expert_factors import ExpertPart
from edgetune_converters.tensors import F32, Read, RowIndex, widened

Index = NDArray[np.intp]


@dataclass(frozen=True)
class ExpertTransforms:
    """The transforms by expert, of a target [experts, n, k] whose rows are numbered through all experts.

    `transposed`: the target holds the matrix of each expert transposed, so that the rows of a part are columns.
    """

    parts: tuple[tuple[ExpertPart, Apply], ...]
    shape: tuple[int, ...]
    transposed: bool

    def __call__(self, base: Read, trained: Read) -> Read:
        of_expert: dict[int, list[tuple[ExpertPart, Read]]] = {}
        for part, apply in self.parts:
            own = self._part_of(base, part)
            merged = apply(own, own if trained is base else self._part_of(trained, part))
            of_expert.setdefault(part.number, []).append((part, merged))

        def read(rows: RowIndex, columns: RowIndex) -> F32:
            found = np.array(widened(base(rows, columns)), np.float32)
            numbers = _numbers(rows, self.shape[0] * self.shape[1])
            expert, inside = np.divmod(numbers, self.shape[1])
            for one in np.unique(expert):
                for part, merged in of_expert.get(int(one), ()):
                    self._put(found, part, merged, np.flatnonzero(expert == one), inside, columns)
            return found

        return read

    def _put(self, found: F32, part: ExpertPart, merged: Read, places: Index, inside: Index, columns: RowIndex) -> None:
        """Write the merged values of a part over the places of its expert."""
        own = inside[places]
        if self.transposed:
            outputs = _numbers(columns, self.shape[2])
            kept = np.flatnonzero((outputs >= part.first) & (outputs < part.first + part.rows))
            if len(kept):
                found[np.ix_(places, kept)] = merged(outputs[kept] - part.first, own).T
            return
        kept = np.flatnonzero((own >= part.first) & (own < part.first + part.rows))
        if len(kept):
            found[places[kept]] = merged(own[kept] - part.first, columns)

    def _part_of(self, read: Read, part: ExpertPart) -> Read:
        """Return a reader of the matrix [outputs, inputs] of one part."""
        before = part.number * self.shape[1]

        def of_rows(rows: RowIndex, columns: RowIndex) -> F32:
            return widened(read(_numbers(rows, part.rows) + part.first + before, columns))

        def of_columns(rows: RowIndex, columns: RowIndex) -> F32:
            stored = read(_numbers(columns, self.shape[1]) + before, _numbers(rows, part.rows) + part.first)
            return widened(stored).T

        return of_columns if self.transposed else of_rows


def _numbers(index: RowIndex, count: int) -> Index:
    return np.arange(count)[index]
