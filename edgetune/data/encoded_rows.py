"""Encoded rows in a few arrays: 5 bytes for each token, where lists of Python numbers take 48."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from edgetune.data.masks import EncodedRow


class EncodedRows(Sequence[EncodedRow]):
    """A sequence of encoded rows that grows at its end. A row is made when it is asked for."""

    def __init__(self, rows: Iterable[EncodedRow] = ()) -> None:
        """Keep the given rows."""
        self._ids = array("i")
        self._supervised = bytearray()
        self._ends = array("Q")
        for row in rows:
            self.append(row)

    def append(self, row: EncodedRow) -> None:
        """Add a row at the end."""
        self._ids.extend(row.input_ids)
        self._supervised += bytes(row.supervised)
        self._ends.append(len(self._ids))

    @property
    def tokens(self) -> int:
        """Number of tokens of all rows."""
        return len(self._ids)

    @property
    def trained(self) -> int:
        """Number of tokens that are trained on."""
        return self._supervised.count(1)

    @property
    def longest(self) -> int:
        """Length of the longest row."""
        starts = (0, *self._ends[:-1])
        return max((end - start for start, end in zip(starts, self._ends, strict=False)), default=0)

    @property
    def buffers(self) -> tuple[array[int], bytes, array[int]]:
        """The token ids of all rows, a byte for each that is 1 if it is trained on, and where each row ends."""
        return self._ids, bytes(self._supervised), self._ends

    def digests(self) -> Iterator[bytes]:
        """Yield a hash of the token ids of each row, to compare rows of several splits."""
        for index in range(len(self)):
            start, end = self._bounds(index)
            yield hashlib.blake2b(self._ids[start:end].tobytes(), digest_size=16).digest()

    def __eq__(self, other: object) -> bool:
        """Whether all rows are equal."""
        return isinstance(other, EncodedRows) and (self._ids, self._supervised, self._ends) == (
            other._ids, other._supervised, other._ends,
        )  # fmt: skip

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[EncodedRow]:
        return map(self._row, range(len(self)))

    @overload
    def __getitem__(self, index: int) -> EncodedRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[EncodedRow]: ...
    def __getitem__(self, index: int | slice) -> EncodedRow | list[EncodedRow]:
        """Return a row, or a list of rows."""
        if isinstance(index, slice):
            return [self._row(each) for each in range(*index.indices(len(self)))]
        return self._row(range(len(self))[index])

    def _bounds(self, index: int) -> tuple[int, int]:
        return (self._ends[index - 1] if index else 0), self._ends[index]

    def _row(self, index: int) -> EncodedRow:
        start, end = self._bounds(index)
        return EncodedRow(self._ids[start:end].tolist(), [*map(bool, self._supervised[start:end])])
