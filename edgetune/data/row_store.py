"""Rows in a temporary file: in memory is where each begins, and the row that is in use."""

from __future__ import annotations

import marshal
import os
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, overload

from edgetune.data.chat_rows import ChatRow, Columns, Label, Pair, PlainText

_PENDING = 1 << 20
"""Bytes of rows that are written at once."""


class _RowFile:
    """The file, which lives as long as one sequence of its rows; the last rows are in memory."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._pending = bytearray()
        self._written = 0

    def append(self, data: bytes) -> int:
        """Add bytes at the end, and return where they begin."""
        start = self._written + len(self._pending)
        self._pending += data
        if len(self._pending) >= _PENDING:
            self._flush()
        return start

    def read(self, start: int, size: int) -> bytes:
        """Return bytes that were added at once."""
        if self._file is None or start >= self._written:
            start -= self._written
            return bytes(self._pending[start : start + size])
        return os.pread(self._file.fileno(), size, start)

    def _flush(self) -> None:
        if self._file is None:
            # closed, and thereby removed, with the last sequence of its rows
            self._file = tempfile.TemporaryFile()  # noqa: SIM115
            weakref.finalize(self, self._file.close)
        self._file.write(self._pending)
        self._file.flush()
        self._written += len(self._pending)
        self._pending = bytearray()


class RowStore(Sequence[ChatRow]):
    """A sequence of rows; slices and selections share its file."""

    def __init__(self, rows: Iterable[ChatRow] = ()) -> None:
        """Keep the given rows."""
        self._file = _RowFile()
        self._starts = array("Q")
        self._sizes = array("L")
        for row in rows:
            self.append(row)

    def append(self, row: ChatRow) -> None:
        """Add a row at the end."""
        data = marshal.dumps(_pack(row))
        self._starts.append(self._file.append(data))
        self._sizes.append(len(data))

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[ChatRow]:
        return map(self._load, range(len(self)))

    @overload
    def __getitem__(self, index: int) -> ChatRow: ...
    @overload
    def __getitem__(self, index: slice) -> RowStore: ...
    def __getitem__(self, index: int | slice) -> ChatRow | RowStore:
        """Return a row, or a part of the rows in the same file."""
        return self.select(range(*index.indices(len(self)))) if isinstance(index, slice) else self._load(index)

    def select(self, indices: Iterable[int]) -> RowStore:
        """Return the rows with these indices, in the same file."""
        chosen = list(indices)
        part = RowStore.__new__(RowStore)
        part._file = self._file
        part._starts = array("Q", [self._starts[index] for index in chosen])
        part._sizes = array("L", [self._sizes[index] for index in chosen])
        return part

    def _load(self, index: int) -> ChatRow:
        return _unpack(marshal.loads(self._file.read(self._starts[index], self._sizes[index])))


def _pack(row: ChatRow) -> tuple[Any, ...]:
    if row.beside is not None:
        return row.messages, row.place, row.unread, _rest(row), _pack_beside(row.beside)
    if row.tools or row.untrained or row.options or row.calls or row.reasoning or row.task:
        return row.messages, row.place, row.unread, _rest(row)
    return row.messages, row.place, row.unread


def _rest(row: ChatRow) -> tuple[Any, ...]:
    return row.tools, row.untrained, dict(row.options), dict(row.calls), dict(row.reasoning), row.task


def _unpack(fields: tuple[Any, ...]) -> ChatRow:
    messages, place, unread, *rest = fields
    if not rest:
        return ChatRow(messages, place=place, unread=unread)
    (tools, untrained, options, calls, reasoning, task), *beside = rest
    row = ChatRow(messages, tools, untrained, place, options, unread, calls, reasoning, task=task)
    if beside:
        row.beside = _unpack_beside(*beside[0])
    return row


def _pack_beside(beside: Pair | Label | Columns | PlainText) -> tuple[Any, ...]:
    match beside:
        case Pair(rejected, prompt, margin):
            return "pair", _pack(rejected), prompt, margin
        case Label(desirable):
            return "label", desirable
        case Columns(values):
            return "columns", values
        case PlainText(text):
            return "text", text


def _unpack_beside(kind: str, *fields: Any) -> Pair | Label | Columns | PlainText:
    if kind == "pair":
        rejected, prompt, margin = fields
        return Pair(_unpack(rejected), prompt, margin)
    return _SIMPLE[kind](*fields)


_SIMPLE: dict[str, type[Label | Columns | PlainText]] = {"label": Label, "columns": Columns, "text": PlainText}
