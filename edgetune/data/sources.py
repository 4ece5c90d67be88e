"""Sources of rows: files, folders, patterns, and datasets of the Hugging Face hub and of ModelScope."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetune import console
from edgetune.data import dataset_info
from edgetune.data.dataset_info import DatasetEntry
from edgetune.data.formats import RowReader, iterate_rows
from edgetune.data.hubs import HUB_PREFIXES, HubDataset, hub_dataset
from edgetune.data.problems import RowProblems
from edgetune.data.row_files import KINDS, PlacedRow, RowFile, data_suffix, is_data_file
from edgetune.data.row_kinds import TEXT
from edgetune.data.row_store import RowStore
from edgetune.errors import DataError

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SPLIT = re.compile(r"[\w.\-\[\]:%+]+")
_WILDCARDS = re.compile(r"[*?\[]")
_LARGE = 16 << 20
"""Bytes of files from which on a bar is shown."""
_SPLIT_WORDS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_NO_ROWS = (dataset_info.FILE_NAME, "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files beside the rows in a folder that the datasets library wrote, or of LLaMA-Factory."""


@dataclass(frozen=True)
class DataSource:
    """The rows of a source as conversations, and what identifies the source."""

    name: str
    rows: RowStore
    formats: list[str]
    """Formats that occur in the rows."""
    identity: dict[str, Any]
    """For the manifest: path and SHA-256 of a file, or name, split and revision of a hub dataset; number of rows."""
    notes: list[str] = field(default_factory=list)
    """What of the source was not read."""


@dataclass(frozen=True)
class SourceName:
    """The name of a source in its parts: `LOCATION:SUBSET@SPLIT#ROWS`, all but the location optional.

    Of a dataset_info.json or its folder, `LOCATION#NAME#ROWS`.
    """

    location: str
    subset: str | None = None
    split: str | None = None
    count: int | None = None
    entry: str | None = None
    """The name of a dataset that the dataset_info.json at the location describes."""

    @classmethod
    def parse(cls, name: str) -> SourceName:
        """Split a name into its parts. A file or folder of the whole name, or of a beginning of it, comes first."""
        count = split = subset = None
        rest = name
        if not _exists(rest):
            stem, mark, text = rest.rpartition("#")
            if mark and text.isdigit() and int(text) > 0:
                rest, count = stem, int(text)
        stem, mark, text = rest.rpartition("#")
        if mark and text and not _exists(rest) and dataset_info.find_file(stem):
            return cls(stem, count=count, entry=text)
        if not _exists(rest):
            stem, mark, text = rest.rpartition("@")
            if stem and mark and _SPLIT.fullmatch(text):
                rest, split = stem, text
        prefix = next((prefix for prefix in HUB_PREFIXES if rest.lower().startswith(prefix)), "")
        if not _exists(rest):
            stem, mark, text = rest[len(prefix) :].rpartition(":")
            if stem and mark and "/" not in text and text:
                rest, subset = prefix + stem, text
        return cls(rest, subset, split, count)


def _exists(location: str) -> bool:
    try:
        return Path(location).expanduser().exists()
    except OSError:  # longer than a file name can be
        return False


def read_source(
    name: str,
    *,
    reader: RowReader | None = None,
    split: str = "train",
    limit: int | None = None,
    problems: RowProblems | None = None,
    full_names: bool = False,
    sample_by: str = "paragraph",
) -> DataSource:
    """Read a file, a folder, the files of a pattern, or a hub dataset.

    Args:
        name: A path, a pattern or the name of a dataset, with the parts of SourceName.
        reader: Converts the rows; by default rows of any format.
        split: The split where the name has none.
        limit: Largest number of rows.
        problems: Where problems of rows are added; without it they are raised together.
        full_names: Whether messages name files with their folders.
        sample_by: What of a file of plain text is a row: line, paragraph or document.

    Raises:
        DataError: For a missing or damaged source; names the rows.
        EnvironmentProblem: If a library that reads the source is missing.
    """
    parsed = SourceName.parse(name)
    reader = reader or RowReader()
    found = RowProblems() if problems is None else problems
    entry = _find_entry(parsed, reader)
    given = reader if entry is None else reader.derive(entry.columns, entry.roles, entry.title)
    limits = (parsed.count, limit, entry.count if entry else None)
    limit = min((n for n in limits if n is not None), default=None)
    opening = _Opening(parsed.split or split, limit, _sampling(reader, entry, sample_by))
    opened = opening.open(parsed) if entry is None else opening.open_entry(entry)
    if full_names and isinstance(opened, Files):
        opened.names = {path: str(path) for path in opened.paths}
    count = 0

    def counted() -> Iterator[PlacedRow]:
        nonlocal count
        for row in opened.rows():
            if limit is not None and count == limit:
                return
            count += 1
            yield row

    before, given.formats = reader.formats, {}
    with _progress_of(opened, parsed.location):
        rows = RowStore(iterate_rows(counted(), given, found))
    formats = list(given.formats)
    reader.formats = {**before, **given.formats}
    if not count:
        raise DataError(f"{parsed.location} is empty: it holds no rows", "Give a dataset with at least one row")
    if problems is None:
        found.raise_if_any()
    identity = {**opened.identity(), "rows": count}
    if entry is None:
        return DataSource(name, rows, formats, identity, [*_notes_of(parsed, count, limit), *opened.notes])
    described = {"dataset_info": str(entry.file), "entry": entry.name}
    return DataSource(name, rows, formats, described | identity, [*entry.notes, *opened.notes])


def _notes_of(name: SourceName, count: int, limit: int | None) -> list[str]:
    """Return the notes about a name that asks for something else than the `count` rows that were read."""
    if name.count is not None and limit is not None and count < limit:
        return [f"#{name.count} asks for more rows than there are: all {count} are used", *_notes_on_folder(name)]
    return _notes_on_folder(name)


def _notes_on_folder(name: SourceName) -> list[str]:
    """Return the note about a folder whose files were all read, though a file in it describes datasets."""
    file = dataset_info.find_file(name.location) if _exists(name.location) else None
    if file is None or not Path(name.location).is_dir():
        return []
    names = dataset_info.names_in(file)
    return [
        f"{name.location}: all its files were read; {file.name} in it describes {len(names)} datasets, which are named "
        f"as {name.location}#{names[0]}"
    ]


def _find_entry(name: SourceName, reader: RowReader) -> DatasetEntry | None:
    """Return the entry of dataset_info.json that a source names; None for another source."""
    if name.entry is not None:
        file = dataset_info.find_file(name.location)
        assert file is not None
        return dataset_info.read_entry(file, name.entry, reader.kind, reader.wanted)
    path = Path(name.location)
    if path.name == dataset_info.FILE_NAME and (file := dataset_info.find_file(name.location)):
        names = dataset_info.names_in(file)
        raise DataError(
            f"{file} describes {len(names)} datasets and holds no rows",
            f"Name one: {name.location}#{names[0]}; it describes {', '.join(names[: dataset_info.SHOWN_NAMES])}",
        )
    return None


def _sampling(reader: RowReader, entry: DatasetEntry | None, sample_by: str) -> str | None:
    """Return what of a file of plain text is a row; LLaMA-Factory reads lines. None if such files are not read."""
    if reader.kind != TEXT:
        return None
    return sample_by if entry is None else "line"


def read_sources(names: str | list[str], *, problems: RowProblems, **options: Any) -> list[DataSource]:
    """Read one source or several; a source that cannot be read is added to the failures of `problems`."""
    sources = []
    listed = [names] if isinstance(names, str) else names
    files = [Path(SourceName.parse(name).location).name for name in listed]
    for name, file in zip(listed, files, strict=True):
        try:
            sources.append(read_source(name, problems=problems, full_names=files.count(file) > 1, **options))
        except DataError as error:
            problems.failures.append(error)
    return sources


def local_files(name: str, split: str) -> list[Path]:
    """Return the files that a source reads; none for a dataset of a hub, and for one that cannot be opened."""
    parsed = SourceName.parse(name)
    opening = _Opening(parsed.split or split, None, "document")
    try:
        if parsed.entry is None:
            opened = opening.open(parsed)
            return opened.paths if isinstance(opened, Files) else []
        file = dataset_info.find_file(parsed.location)
        entry = dataset_info.read_entry(file, parsed.entry) if file else None
        opened = opening.open_entry(entry) if entry else opening.open(parsed)
    except DataError:
        return []
    of_info = [file] if file else []
    return [*of_info, *opened.paths] if isinstance(opened, Files) else of_info


@contextmanager
def _progress_of(opened: Files | HubDataset, name: str) -> Iterator[None]:
    """Show a bar while large files are read."""
    if isinstance(opened, HubDataset) or opened.size < _LARGE:
        yield
        return
    with console.byte_progress(f"reading {Path(name).name}") as update:
        opened.progress = update
        yield


@dataclass(frozen=True)
class _Opening:
    """How sources are opened."""

    split: str
    limit: int | None
    sample_by: str | None
    """What of a file of plain text is a row; None where such files are not read."""

    def open(self, name: SourceName) -> Files | HubDataset:
        location, split = name.location, self.split
        dataset = hub_dataset(location, name.subset, split, self.limit)
        if dataset is not None:
            return dataset
        path = Path(location).expanduser()
        if path.is_dir():
            if name.subset is not None and (path / name.subset).is_dir():
                path /= name.subset
            elif name.subset is not None or _has_configurations(path):
                return HubDataset("folder", str(path), name.subset, split, self.limit)
            return self._open_folder(path, name.split is not None)
        if path.exists():
            _refuse_parts(name, path)
            return self._open_file(path)
        if _WILDCARDS.search(location):
            return self._with_text(_open_pattern(path, split))
        if _looks_like_path(location) or _HUB_NAME.fullmatch(location) is None:
            if re.search(r"#0+$", location):
                raise DataError(f"{location} takes no rows", "Give a number of at least 1 after #")
            relative = "" if path.is_absolute() else "; paths are relative to the folder of the configuration"
            raise DataError(
                f"there is no data file {path}", f"Check data.train, data.validation and data.test{relative}"
            )
        return HubDataset("hf", location, name.subset, split, self.limit)

    def open_entry(self, entry: DatasetEntry) -> Files | HubDataset:
        if entry.hub is not None:
            hub, name = entry.hub
            return HubDataset(hub, name, entry.subset, entry.split or self.split, self.limit, entry.folder)
        assert entry.path is not None
        return self._open_folder(entry.path, False) if entry.path.is_dir() else self._open_file(entry.path)

    def _open_file(self, path: Path) -> Files:
        return self._with_text(Files(str(path), [path], {path: path.name}, self.split))

    def _open_folder(self, folder: Path, split_is_named: bool) -> Files:
        return self._with_text(_open_folder(folder, self.split, split_is_named, self.sample_by is not None))

    def _with_text(self, files: Files) -> Files:
        files.sample_by = self.sample_by
        return files


def _refuse_parts(name: SourceName, path: Path) -> None:
    """Raise DataError for a subset or a split of a file that has none; a .json file can hold a list for each split."""
    may_hold_splits = data_suffix(path) in KINDS["json"] or not is_data_file(path, True)
    given = f":{name.subset}" if name.subset is not None else f"@{name.split}" if name.split is not None else ""
    if given and (name.subset is not None or not may_hold_splits):
        kind = "subsets" if name.subset is not None else "splits"
        raise DataError(f"{path} is one file without {kind}, so {given} names nothing", f"Remove {given}")


def _looks_like_path(location: str) -> bool:
    return location.startswith((".", "/", "~")) or is_data_file(Path(location), True)


@dataclass
class Files:
    """The rows of one file or more, in order."""

    location: str
    paths: list[Path]
    names: Mapping[Path, str]
    split: str
    sample_by: str | None = None
    """What of a file of plain text is a row; None where such files are not read."""
    progress: console.Progress | None = None
    """Called with (bytes read, bytes of all files)."""
    notes: list[str] = field(default_factory=list)
    identities: list[dict[str, Any]] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Number of bytes."""
        return sum(path.stat().st_size for path in self.paths)

    def rows(self) -> Iterator[PlacedRow]:
        """Yield the rows with their places."""
        total, done = self.size, 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if self.progress is not None:
                self.progress(done, total)

        for path in self.paths:
            file = RowFile(path, self.names[path], self.split, self.sample_by, advance)
            yield from file.rows()
            self.identities.append({**file.identity, "name": file.name})

    def identity(self) -> dict[str, Any]:
        """Return path and SHA-256 of the file; of several files, the hash of their hashes, and these."""
        if len(self.paths) == 1 and self.location == str(self.paths[0]):
            return {"path": self.location, "sha256": self._hash_of(0)}
        files = [{"name": self.names[path], "sha256": self._hash_of(at)} for at, path in enumerate(self.paths)]
        digest = hashlib.sha256("\n".join(str(each["sha256"]) for each in files).encode()).hexdigest()
        return {"path": self.location, "sha256": digest, "files": files}

    def _hash_of(self, index: int) -> str:
        if index < len(self.identities):
            return str(self.identities[index]["sha256"])
        return RowFile(self.paths[index], "").sha256()  # not read to its end, for want of rows to take


def _open_folder(folder: Path, split: str, split_is_named: bool, reads_text: bool) -> Files:
    """Open the data files of a folder; where names of files or folders are splits, those of the split."""
    inside = sorted(path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path.relative_to(folder)))
    files = [path for path in inside if is_data_file(path, reads_text) and not _holds_no_rows(path)]
    if not files:
        raise DataError(
            f"{folder} is a directory without data files"
            + (f"; it holds {', '.join(path.name for path in inside[:5])}" if inside else ""),
            f"Give a folder with .jsonl, .json, .csv, .parquet or .arrow{' or .txt' if reads_text else ''} files",
        )
    splits = {path: _split_of(path.relative_to(folder)) for path in files}
    marked = {word for word in splits.values() if word is not None}
    wanted = _SPLIT_WORDS.get(split, split)
    chosen = [path for path in files if splits[path] == wanted or (marked and split in path.stem)]
    if not marked and not split_is_named:
        chosen = files
    if not chosen:
        raise DataError(
            f"{folder} has no files of the split {split}; its files are of {', '.join(sorted(marked)) or 'no split'}",
            "Name the split (data.split, or FOLDER@SPLIT), or give the files themselves",
        )
    names = {path: str(path.relative_to(folder)) for path in files}
    rest = [names[path] for path in files if path not in chosen and splits[path] is None]
    notes = [f"{folder}: not read, for their names are of no split: {', '.join(rest)}"] if rest else []
    return Files(str(folder), chosen, names, split, notes=notes)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def _holds_no_rows(path: Path) -> bool:
    return path.name in _NO_ROWS or path.name.startswith("cache-")


def _split_of(path: Path) -> str | None:
    words = re.split(r"[^a-z]+", str(path.with_suffix("")).lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)


def _has_configurations(folder: Path) -> bool:
    """Whether a folder is a clone of a hub dataset whose README.md states which files are of which subset."""
    readme = folder / "README.md"
    if not readme.is_file():
        return False
    text = readme.read_text(encoding="utf-8", errors="replace")
    return text.startswith("---") and re.search(r"^configs:", text.split("\n---", 1)[0], re.MULTILINE) is not None


def _open_pattern(pattern: Path, split: str) -> Files:
    parts = pattern.parts
    first = next(at for at, part in enumerate(parts) if _WILDCARDS.search(part))
    root = Path(*parts[:first]) if first else Path()
    try:
        paths = sorted(path for path in root.glob(str(Path(*parts[first:]))) if path.is_file())
    except ValueError as error:
        raise DataError(f"the pattern {pattern} cannot be used: {error}", "Write ** as a part of its own") from None
    if not paths:
        raise DataError(f"no file matches the pattern {pattern}", "Check data.train, data.validation and data.test")
    return Files(str(pattern), paths, {path: str(path.relative_to(root)) for path in paths}, split)
