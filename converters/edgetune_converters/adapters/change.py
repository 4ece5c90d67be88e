"""The change of one tensor of the base: a new value, a product of two factors, or a transform of its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgetune_converters.adapters.token_rows import TokenRows
from edgetune_converters.adapters.weights import AdapterWeights
from edgetune_converters.tensors import F32, Read, RowIndex, TensorInfo, widened

Apply = Callable[[Read, Read], Read]
"""Returns a reader of merged values, in f32, for two readers of a matrix: of the base that is merged into, and of the
base as it was in training (the same object where that is the same). Readers must work for any rows and columns, and on
several threads at once."""


@dataclass(frozen=True)
class Transform:
    """A change that is not a product of two small factors, of a matrix as the base stores it.

    Rows of a parameter of all experts are numbered through all experts; a vector is a column.
    """

    apply: Apply
    tensors: tuple[TensorInfo, ...]
    """The adapter's tensors that it is made of."""
    changes_nothing: Callable[[], bool] = lambda: False
    """Whether the merged values are those of the base, known from the adapter alone."""
    needs_trained: bool = False
    """Whether it reads the base as it was in training."""


@dataclass
class Change:
    """The change of one tensor of shape [n, k]: W becomes transform(replacement or W) + left @ right.

    `left` is f32 [n, r], `right` f32 [r, k]; the scale is folded into the factor made of B. For a parameter of all
    experts both have the experts as first axis. Factors are read on demand. `token_rows` replace single rows of W.
    A change has factors or a transform, not both.
    """

    file: AdapterWeights
    replacement: TensorInfo | None = None
    factors: Callable[[], tuple[F32, F32]] | None = None
    names: list[str] = field(default_factory=list)
    token_rows: TokenRows | None = None
    transform: Transform | None = None

    def of_expert(self, number: int, first: int, count: int, *, transposed: bool = False) -> Change:
        """Return the part of a change of all experts that concerns rows first..first+count of one.

        `transposed`: the parameter of all experts holds the matrix of each expert transposed.
        """
        whole = self.factors
        assert whole is not None

        def part() -> tuple[F32, F32]:
            left, right = (each[number] for each in whole())
            if transposed:
                left, right = right.T, left.T
            return np.ascontiguousarray(left[first : first + count]), np.ascontiguousarray(right)

        return Change(self.file, factors=part, names=self.names)


def of_all(transforms: Sequence[Transform], apply: Apply) -> Transform:
    """Return the transform `apply`, which is made of several."""
    return Transform(
        apply,
        tuple(info for transform in transforms for info in transform.tensors),
        lambda: all(transform.changes_nothing() for transform in transforms),
        any(transform.needs_trained for transform in transforms),
    )


def transposed(read: Read) -> Read:
    """Return a reader of the transposed matrix, in f32."""
    return lambda rows, columns: widened(read(columns, rows)).T


def on_transposed(apply: Apply) -> Apply:
    """Return the same transform for a matrix that the base stores transposed."""

    def flipped(base: Read, trained: Read) -> Read:
        turned = transposed(base)
        return transposed(apply(turned, turned if trained is base else transposed(trained)))

    return flipped


ReadDelta = Callable[[RowIndex, RowIndex], F32]
"""Reads rows and columns of what is added to a matrix."""


def added(delta: Callable[[], ReadDelta]) -> Apply:
    """Return the transform that adds a matrix; `delta` is called once and returns a reader of its values."""

    def apply(base: Read, trained: Read) -> Read:
        read = delta()
        return lambda rows, columns: widened(base(rows, columns)) + read(rows, columns)

    return apply


def scaled(factors: Callable[[], F32], *, of_columns: bool) -> Apply:
    """Return the transform that multiplies each column, or each row, by its factor."""

    def apply(base: Read, trained: Read) -> Read:
        values = factors().reshape(-1)

        def read(rows: RowIndex, columns: RowIndex) -> F32:
            return widened(base(rows, columns)) * (values[columns] if of_columns else values[rows][:, None])

        return read

    return apply
