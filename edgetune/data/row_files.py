"""Rows of files: JSON lines, JSON, CSV, TSV, Parquet and Arrow, compressed or not, each row with its place.

A row that cannot be read is a RowProblem in its place, so that all problems of a file are reported together.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from edgetune.data.compression import COMPRESSIONS, decompress
from edgetune.data.formats import detect_format
from edgetune.data.problems import RowProblem
from edgetune.data.row_kinds import KINDS as KINDS_OF_ROWS
from edgetune.data.row_kinds import TEXT
from edgetune.errors import DataError, EnvironmentProblem
from edgetune_converters.files.contents import sha256_of

Place = str
"""The place of a row for messages: 'train.jsonl, line 3'."""
PlacedRow = tuple[Place, Any]

_decode = json.JSONDecoder().raw_decode
_BLOCK = 1 << 20
_BATCH_ROWS = 1000
_MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32"), (b"\x00\x00\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"),
)  # fmt: skip


@dataclass
class RowFile:
    """A file of rows."""

    path: Path
    name: str
    """What messages call it."""
    split: str = "train"
    """The list of rows that is read from a .json file with a list for each split."""
    sample_by: str | None = None
    """What of a file of plain text is a row: line, paragraph or document; None where such files are not read."""
    progress: Callable[[int], None] = lambda count: None
    """Called with the number of bytes that were read since the last call."""
    identity: dict[str, Any] = field(default_factory=dict)
    """Path and SHA-256, as soon as all rows are read."""

    def rows(self) -> Iterator[PlacedRow]:
        """Yield the rows with their places.

        Raises:
            DataError: If the file is missing, damaged or of a kind that is not read.
            EnvironmentProblem: If a library for its kind is missing.
        """
        kind = kind_of(self.path, self.sample_by is not None)
        if kind in _TABLES:
            self.progress(self.path.stat().st_size)
            yield from self.number(_TABLES[kind](self.path), "row")
            self.identity = {"path": str(self.path), "sha256": sha256_of(self.path)}
            return
        with self.path.open("rb", buffering=0) as raw:
            counted = _HashedReader(raw, self.progress)
            stream = decompress(io.BufferedReader(counted, _BLOCK), self.path)
            yield from _TEXTS[kind](self, stream)
            while counted.readinto(bytearray(_BLOCK)):  # the hash is that of the whole file
                pass
            self.identity = {"path": str(self.path), "sha256": counted.digest.hexdigest()}

    def sha256(self) -> str:
        """Return the SHA-256 of the file."""
        return str(self.identity.get("sha256") or sha256_of(self.path))

    def number(self, rows: Iterator[Any], what: str) -> Iterator[PlacedRow]:
        """Yield rows with their numbers as their places."""
        for number, row in enumerate(rows, 1):
            yield f"{self.name}, {what} {number}", row


class _HashedReader(io.RawIOBase):
    """A file that is hashed and counted while it is read."""

    def __init__(self, raw: io.FileIO, progress: Callable[[int], None]) -> None:
        self._raw = raw
        self._progress = progress
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer) or 0
        self.digest.update(memoryview(buffer)[:count])
        self._progress(count)
        return count


def kind_of(path: Path, reads_text: bool = False) -> str:
    """Return the kind of a data file (a key of KINDS). Raises DataError for other files.

    Args:
        path: The file.
        reads_text: Whether files of plain text are read, as for continued pretraining.
    """
    suffix = data_suffix(path)
    kinds = {**KINDS, **(TEXT_KINDS if reads_text else {})}
    kind = next((kind for kind, suffixes in kinds.items() if suffix in suffixes), None)
    if kind is not None:
        if kind in _TABLES and path.suffix.lower() in COMPRESSIONS:
            raise DataError(f"{path} is a compressed {kind} file, which is read at its end first", "Decompress it")
        return kind
    with path.open("rb") as file:
        start = file.read(8)
    if not suffix and start.startswith((b"PAR1", b"ARROW1")):
        return "parquet" if start.startswith(b"PAR1") else "arrow"
    if not suffix and start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"["):
        return "json"
    reason, hint = _OTHER_KINDS.get(suffix, ("of an unknown kind", ""))
    known = ", ".join(name for suffixes in kinds.values() for name in suffixes)
    raise DataError(f"{path} is {reason}", hint or f"Give a file of these kinds: {known}; or a dataset of a hub")


def data_suffix(path: Path) -> str:
    """Return the suffix of a file without that of its compression: `.jsonl` of `a.jsonl.gz`."""
    return (Path(path.stem) if path.suffix.lower() in COMPRESSIONS else path).suffix.lower()


def is_data_file(path: Path, reads_text: bool = False) -> bool:
    """Whether the name of a file is that of a data file; of one of plain text, if those are read."""
    kinds = {**KINDS, **(TEXT_KINDS if reads_text else {})}
    return any(data_suffix(path) in suffixes for suffixes in kinds.values())


def _encoding(start: bytes) -> str:
    """Return the encoding of a text by its byte order mark, or by the zeros of its first two characters."""
    marked = next((encoding for mark, encoding in _MARKS if start.startswith(mark)), None)
    zeros = [byte == 0 for byte in start[:4]]
    if zeros == [False, True, False, True]:
        return "utf-16-le"
    return marked or ("utf-16-be" if zeros == [True, False, True, False] else "utf-8")


def _lines(stream: io.BufferedReader, name: str) -> Iterator[str | RowProblem]:
    """Yield the lines of a text with their ends; a line that is not UTF-8 is a problem."""
    encoding = _encoding(stream.peek(4)[:4])
    if encoding == "utf-8":
        yield from _utf8_lines(stream)
        return
    try:
        yield from io.TextIOWrapper(stream, encoding, newline="\n")
    except UnicodeError as error:
        raise _wrong_encoding(name, encoding, error) from None


def _wrong_encoding(name: str, encoding: str, error: UnicodeError) -> DataError:
    return DataError(f"{name} is not {encoding.upper()} text, as it begins: {error}", "Save it as UTF-8")


def _utf8_lines(lines: Iterable[bytes]) -> Iterator[str | RowProblem]:
    encoding = "utf-8-sig"
    for line in lines:
        try:
            yield line.decode(encoding)
        except UnicodeDecodeError as error:
            yield RowProblem(
                f"not UTF-8 text: byte {error.start + 1} of the line is 0x{error.object[error.start]:02x}",
                "Save the file as UTF-8, for example with `iconv -f WINDOWS-1252 -t UTF-8`",
            )
        encoding = "utf-8"


def _read_jsonl(file: RowFile, stream: io.BufferedReader) -> Iterator[PlacedRow]:
    lines = _lines(stream, file.name)
    begin: list[str | RowProblem] = []
    for line in lines:
        begin.append(line)
        if isinstance(line, RowProblem) or not line.isspace():
            break
    first = begin[-1].strip() if begin and isinstance(begin[-1], str) else ""
    if first in ("[", "{", "[{") or (first.startswith("[") and first.endswith(",")):
        yield from _parse_document(file, [*begin, *lines])  # a .json file under another name
    else:
        yield from _parse_lines(file, chain(begin, lines))


def _parse_lines(file: RowFile, lines: Iterable[str | RowProblem]) -> Iterator[PlacedRow]:
    place = f"{file.name}, line "
    for number, line in enumerate(lines, 1):
        if type(line) is not str:
            yield f"{place}{number}", line
        elif not line.isspace():
            yield f"{place}{number}", parse_line(line)


def parse_line(line: str) -> Any:
    """Return the value of a line of JSON, or the problem of it."""
    try:
        value, end = _decode(line)
        return value if line[end:].isspace() or end == len(line) else json.loads(line)
    except (RecursionError, ValueError):  # a problem, or white space before the value
        pass
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        start = line.strip()[:40]
        column = min(error.pos, len(line.rstrip())) + 1
        return RowProblem(f"not JSON: {error.msg} at column {column}; the line begins {start!r}")
    except (RecursionError, ValueError) as error:
        return RowProblem(_other_json_problem(error))


def _other_json_problem(error: Exception) -> str:
    too_deep = isinstance(error, RecursionError)
    return "not JSON that can be read: " + ("it is nested too deeply" if too_deep else str(error).partition(";")[0])


def _read_json(file: RowFile, stream: io.BufferedReader) -> Iterator[PlacedRow]:
    return _parse_document(file, list(_lines(stream, file.name)))


def _parse_document(file: RowFile, lines: list[str | RowProblem]) -> Iterator[PlacedRow]:
    """Yield the rows of one JSON value, or of several in succession, which need not be one on each line."""
    bad = next(((number, line) for number, line in enumerate(lines, 1) if isinstance(line, RowProblem)), None)
    if bad is not None:
        raise DataError(f"{file.path}, line {bad[0]}: {bad[1]}", bad[1].hint)
    text = "".join(map(str, lines))
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text[: error.pos].strip().count("\n") == 0:  # one object per line
            yield from _parse_lines(file, lines)
            return
        if error.msg == "Extra data":
            yield from file.number(_parse_values(file, text), "row")
            return
        raise _not_json(file, error) from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{file.path}: {_other_json_problem(error)}", "Give a JSON array of rows") from None
    yield from file.number(iter(_json_rows(file, value)), "row")


def _parse_values(file: RowFile, text: str) -> Iterator[Any]:
    """Yield JSON values that follow each other, each over several lines."""
    end = 0
    while rest := text[end : end + 1]:
        if rest.isspace():
            end += 1
            continue
        try:
            value, end = _decode(text, end)
        except json.JSONDecodeError as error:
            raise _not_json(file, error) from None
        except (RecursionError, ValueError) as error:
            raise DataError(f"{file.path}: {_other_json_problem(error)}", "Give a JSON array of rows") from None
        yield value


def _not_json(file: RowFile, error: json.JSONDecodeError) -> DataError:
    return DataError(
        f"{file.path}, line {error.lineno}: not JSON: {error.msg} at column {error.colno}"
        + ("" if error.doc[error.pos :].strip() else ", where the file ends: it is not complete"),
        "Give a JSON array of rows, or a .jsonl file",
    )


def _json_rows(file: RowFile, value: Any) -> list[Any]:
    """Return the rows of a JSON value: a list, an object that holds one, a table as columns, or one row."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise DataError(
            f"{file.path} holds {type(value).__name__}, not an array of rows", "Give a JSON array of objects"
        )
    lists = {key: each for key, each in value.items() if isinstance(each, list)}
    if len(lists) > 1 and len(lists) == len(value) and len({len(each) for each in lists.values()}) == 1:
        texts = all(isinstance(cell, str | None) for each in lists.values() for cell in each)
        if texts:  # columns, as pandas writes them
            return [dict(zip(lists, cells, strict=True)) for cells in zip(*lists.values(), strict=True)]
    if isinstance(lists.get(file.split), list):
        return lists[file.split]
    rows_within = any(isinstance(row, dict) and detect_format(row) for each in lists.values() for row in each[:1])
    if detect_format(value) is not None and not rows_within:
        return [value]
    of_objects = [each for each in lists.values() if all(isinstance(row, dict | list) for row in each)]
    return of_objects[0] if len(of_objects) == 1 else [value]


def _read_csv(file: RowFile, stream: io.BufferedReader) -> Iterator[PlacedRow]:
    """Yield the records of a table with a header; the place of a record is its first line."""

    def text_lines() -> Iterator[str]:
        for number, line in enumerate(_lines(stream, file.name), 1):
            if isinstance(line, RowProblem):
                raise DataError(f"{file.name}, line {number}: {line}", line.hint)
            yield line

    csv.field_size_limit(2**31 - 1)
    lines = text_lines()
    first, skipped = next(lines, ""), 0
    declared = re.fullmatch(r"sep=(.)", first.strip("\r\n"), re.IGNORECASE)
    if declared:  # the line that spreadsheets write for each other
        first, skipped = next(lines, ""), 1
    delimiter = "\t" if data_suffix(file.path) in _TAB_SUFFIXES else _delimiter(first)
    delimiter = declared[1] if declared else delimiter
    reader = csv.reader(chain([first] if first else [], lines), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        place = f"{file.name}, line {reader.line_num + 1 + skipped}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None:
                raise DataError(
                    f"{place}: not CSV: {error}", "Correct the first line, which names the columns"
                ) from None
            yield place, RowProblem(f"not CSV: {error}", "Write a quote in a quoted cell twice")
            continue
        if not cells:
            continue
        if header is None:
            header = _header(file, cells)
        elif len(cells) != len(header):
            yield (
                place,
                RowProblem(f"has {len(cells)} cell{'s' * (len(cells) != 1)} where the header has {len(header)}"),
            )
        else:
            yield place, dict(zip(header, cells, strict=True))


def _read_text(file: RowFile, stream: io.BufferedReader) -> Iterator[PlacedRow]:
    """Yield the lines, the paragraphs between blank lines, or the whole of a text; its place is its first line."""
    place = f"{file.name}, line "
    part: list[str] = []
    start = 0
    for number, line in enumerate(_lines(stream, file.name), 1):
        if isinstance(line, RowProblem):
            yield f"{place}{number}", line
            continue
        is_blank = not line.strip()
        if is_blank and file.sample_by != "document":
            if part:
                yield f"{place}{start}", {"text": "".join(part).rstrip("\r\n")}
            part = []
            continue
        start = start if part else number
        part.append(line)
        if file.sample_by == "line":
            yield f"{place}{number}", {"text": line.rstrip("\r\n")}
            part = []
    text = "".join(part)
    if text.strip():
        yield f"{place}{start}", {"text": text if file.sample_by == "document" else text.rstrip("\r\n")}


def _delimiter(header: str) -> str:
    """Return the delimiter that makes most columns of a header; a comma where several do."""
    counts = {delimiter: header.count(delimiter) for delimiter in (",", ";", "\t", "|")}
    return max(counts, key=lambda delimiter: counts[delimiter])


def _header(file: RowFile, cells: list[str]) -> list[str]:
    names = [cell.strip() or f"column {number}" for number, cell in enumerate(cells, 1)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{file.path} has two columns {twice!r}", "Rename one of them in the first line")
    return names


def _read_parquet(path: Path) -> Iterator[Any]:
    pyarrow = _import_pyarrow(path)
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH_ROWS):
                yield from map(plain_value, batch.to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a parquet file: {error}", "Check the file") from None


def _read_arrow(path: Path) -> Iterator[Any]:
    """Yield the rows of an Arrow file or stream (Feather is the file format)."""
    pyarrow = _import_pyarrow(path)
    try:
        with pyarrow.memory_map(str(path)) as source:
            try:
                file = pyarrow.ipc.open_file(source)
                batches = (file.get_batch(index) for index in range(file.num_record_batches))
            except pyarrow.ArrowInvalid:
                source.seek(0)
                batches = iter(pyarrow.ipc.open_stream(source))
            for batch in batches:
                for start in range(0, batch.num_rows, _BATCH_ROWS):
                    yield from map(plain_value, batch.slice(start, _BATCH_ROWS).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not an Arrow file: {error}", "Check the file") from None


def _import_pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise EnvironmentProblem(f"reading {path} needs pyarrow", "Run `pip install 'edgetune[train]'`") from None
    return pyarrow


def plain_value(value: Any) -> Any:
    """Return a value of a table without the nulls that fill absent keys of its objects; a null content stays."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return {key: plain_value(each) for key, each in value.items() if each is not None or key == "content"}
    if isinstance(value, list | tuple):
        return [plain_value(each) for each in value]
    return value if isinstance(value, bool | int | float | bytes | None) else str(value)


_TAB_SUFFIXES = (".tsv", ".tab")
KINDS = {
    "jsonl": (".jsonl", ".ndjson", ".jsonlines"),
    "json": (".json",),
    "csv": (".csv", *_TAB_SUFFIXES),
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow", ".feather"),
}
"""The kinds of data files, and their suffixes."""
TEXT_KINDS = {"text": (".txt", ".text")}
"""The kind of files that only continued pretraining reads."""
_TEXTS: dict[str, Callable[[RowFile, io.BufferedReader], Iterator[PlacedRow]]] = {
    "jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv, "text": _read_text,
}  # fmt: skip
_TABLES: dict[str, Callable[[Path], Iterator[Any]]] = {"parquet": _read_parquet, "arrow": _read_arrow}
_OF_ROWS = "Write the rows as JSON lines (.jsonl)"
_OTHER_KINDS = {
    **dict.fromkeys(
        (".txt", ".md"),
        (
            f"plain text: these are rows for the objective {' or '.join(KINDS_OF_ROWS[TEXT].objectives)}",
            "Set objective.kind (for .txt files), or give rows of questions and answers, such as a .jsonl file",
        ),
    ),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), ("a spreadsheet", "Save the table as CSV")),
    **dict.fromkeys(
        (".zip", ".tar", ".tgz", ".7z", ".rar"), ("an archive", "Unpack it, and give the folder or its files")
    ),
    **dict.fromkeys((".yaml", ".yml"), ("YAML", _OF_ROWS)),
    ".py": ("a loading script, and edgetune runs no code of a dataset", "Give the files with the rows"),
    ".pkl": ("a pickle, which can run code", _OF_ROWS),
}
"""What files of other kinds are, and what to do."""
