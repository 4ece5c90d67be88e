"""Rows of an embedding that were trained alone: PEFT's `trainable_token_indices`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgetune_converters.adapters.weights import AdapterWeights
from edgetune_converters.tensors import ALL, F32, Read, RowIndex, TensorInfo, widened


@dataclass(frozen=True)
class TokenRows:
    """New values of the rows `ids`, [len(ids), k]. PEFT calls them a delta, but they replace the rows."""

    file: AdapterWeights
    values: TensorInfo
    ids: Sequence[int]

    def read(self) -> F32:
        """Return the values."""
        return self.file.rows(self.values, ALL)

    def over(self, read: Read) -> Read:
        """Return a reader that gives these rows instead of those of `read`, in f32."""
        values = self.read()
        number_of = {row: number for number, row in enumerate(self.ids)}

        def merged(rows: RowIndex, columns: RowIndex) -> F32:
            found = np.array(widened(read(rows, columns)), np.float32)
            first = rows.start or 0 if isinstance(rows, slice) else 0
            asked = range(first, first + len(found)) if isinstance(rows, slice) else rows
            for place, row in enumerate(asked):
                if (number := number_of.get(int(row))) is not None:
                    found[place] = values[number][columns]
            return found

        return merged
