"""Sources of rows: .jsonl, .json and .parquet files, and datasets of the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.data.formats import ChatRow, RowReader, convert_rows
from edgetune.data.problems import RowProblem, RowProblems
from edgetune.errors import DataError, EnvironmentProblem
from edgetune_converters.files.contents import sha256_of

Place = str
"""The place of a row for messages: 'train.jsonl, line 3'."""

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class DataSource:
    """The rows of a source as conversations, and what identifies the source."""

    name: str
    rows: list[ChatRow]
    formats: list[str]
    """Formats that occur in the rows."""
    identity: dict[str, Any]
    """For the manifest: path and SHA-256 of a file, or name, split and revision of a hub dataset; number of rows."""


def read_source(
    name: str,
    *,
    form: str = "auto",
    split: str = "train",
    limit: int | None = None,
    problems: RowProblems | None = None,
) -> DataSource:
    """Read a file or a hub dataset.

    Args:
        name: A path or the name of a dataset; `name#500` takes the first 500 rows.
        form: The format of the rows, or "auto".
        split: The split of a hub dataset.
        limit: Largest number of rows.
        problems: Where problems of rows are added; without it they are raised together.

    Raises:
        DataError: For a missing or damaged source; names the rows.
    """
    location, count = _parse_count(name)
    limit = min((n for n in (count, limit) if n is not None), default=None)
    if _is_hub_name(location):
        rows, identity = _read_hub(location, split, limit)
    else:
        rows, identity = _read_path(Path(location).expanduser())
    if limit is not None:
        rows = rows[:limit]
    if not rows:
        raise DataError(f"{location} is empty: it holds no rows", "Give a dataset with at least one row")
    reader = RowReader(form)
    converted = convert_rows(rows, reader, problems)
    return DataSource(name, converted, list(reader.formats), {**identity, "rows": len(rows)})


def read_sources(names: str | list[str], **options: Any) -> list[DataSource]:
    """Read one source or several."""
    return [read_source(name, **options) for name in ([names] if isinstance(names, str) else names)]


def _parse_count(name: str) -> tuple[str, int | None]:
    stem, mark, count = name.rpartition("#")
    if mark and count.isdigit() and int(count) > 0:
        return stem, int(count)
    return name, None


def _is_hub_name(location: str) -> bool:
    """Whether a name is neither an existing path nor looks like one."""
    looks_like_file = location.startswith((".", "/", "~")) or Path(location).suffix in _READERS
    return not looks_like_file and not Path(location).exists() and _HUB_NAME.fullmatch(location) is not None


def _read_path(path: Path) -> tuple[list[tuple[Place, Any]], dict[str, Any]]:
    if not path.exists():
        raise DataError(f"there is no data file {path}", "Check data.train, data.validation and data.test")
    reader = _READERS.get(path.suffix.lower())
    if path.is_dir() or reader is None:
        raise DataError(
            f"{path} is {'a directory' if path.is_dir() else 'of an unknown kind'}",
            f"Give a {', '.join(_READERS)} file, or the name of a Hugging Face dataset",
        )
    try:
        rows = list(reader(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})", "Save it as UTF-8") from None
    return rows, {"path": str(path), "sha256": sha256_of(path)}


def _read_jsonl(path: Path) -> Iterator[tuple[Place, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{path.name}, line {number}", _parse(line)


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        start = line.strip()[:40]
        column = min(error.pos, len(line.rstrip())) + 1
        return RowProblem(f"not JSON: {error.msg} at column {column}; the line begins {start!r}")


def _read_json(path: Path) -> Iterator[tuple[Place, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object per line in a .json file, as in many datasets
            yield from _read_jsonl(path)
            return
        raise DataError(
            f"{path}, line {error.lineno}: not JSON: {error.msg}", "Give a JSON array of rows, or a .jsonl file"
        ) from None
    if isinstance(rows, dict):
        rows = rows.get("data", [rows]) if set(rows) <= {"data", "version"} else [rows]
    if not isinstance(rows, list):
        raise DataError(f"{path} holds {type(rows).__name__}, not an array of rows", "Give a JSON array of objects")
    for number, row in enumerate(rows, 1):
        yield f"{path.name}, row {number}", row


def _read_parquet(path: Path) -> Iterator[tuple[Place, Any]]:
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet as parquet  # type: ignore[import-untyped]
    except ImportError:
        raise EnvironmentProblem(f"reading {path} needs pyarrow", "Run `pip install 'edgetune[train]'`") from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a parquet file: {error}", "Check the file") from None
    for number, row in enumerate(rows, 1):
        yield f"{path.name}, row {number}", _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    """Return a value of a table without the nulls that fill absent keys of its objects; a null content stays."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None or key == "content"}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}


def _read_hub(name: str, split: str, limit: int | None) -> tuple[list[tuple[Place, Any]], dict[str, Any]]:
    """Load a dataset of the hub without running its code; `name:subset` selects a subset."""
    try:
        import datasets
        from huggingface_hub import HfApi
    except ImportError:
        raise EnvironmentProblem(f"the dataset {name} needs datasets", "Run `pip install 'edgetune[train]'`") from None
    repository, _, subset = name.partition(":")
    datasets.disable_progress_bars()
    piece = f"{split}[:{limit}]" if limit else split
    try:
        revision = HfApi().dataset_info(repository).sha
        table = datasets.load_dataset(repository, subset or None, split=piece, revision=revision)
    except Exception as error:  # noqa: BLE001 - the many errors of the hub need the same answer
        raise DataError(
            f"{name} is neither a file nor a Hugging Face dataset that can be loaded: {_first_line(error)}",
            "Check the path, the name, the split (data.split) and the network",
        ) from None
    rows = [(f"{name}, row {number}", _without_nulls(dict(row))) for number, row in enumerate(table, 1)]
    return rows, {"dataset": repository, "subset": subset or None, "split": split, "revision": revision}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
