"""Datasets that LLaMA-Factory's dataset_info.json describes: where each is, and what its keys and roles mean.

The keys of an entry are those of LLaMA-Factory's data/README.md. The file is read, never written.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetune.data.row_kinds import KINDS, PAIR, TEXT
from edgetune.errors import DataError

FILE_NAME = "dataset_info.json"
SHOWN_NAMES = 20
_FORMATS = ("alpaca", "sharegpt", "openai")
COLUMNS = {
    "prompt": "user", "query": "input", "response": "assistant", "history": "history", "messages": "messages",
    "system": "system", "tools": "tools", "chosen": "chosen", "rejected": "rejected", "kto_tag": "label",
    "images": "images", "videos": "videos", "audios": "audios",
}  # fmt: skip
"""Columns of an entry -> what edgetune calls them (data.columns)."""
TAGS = {"role_tag": "role", "content_tag": "content"}
"""Tags of an entry that name keys of messages -> data.columns."""
ROLE_TAGS = {
    "user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "function_tag": "function_call",
    "system_tag": "system",
}  # fmt: skip
"""Tags of an entry that name roles -> the role."""
REFUSED = {
    "script_url": ("is a loading script, and edgetune runs no code of a dataset", "Give the files with the rows"),
    "cloud_file_name": ("is in a cloud storage", "Download it, and state its file_name"),
    "om_hub_url": ("is on a hub that edgetune does not read", "Download it, and state its file_name"),
}
"""Places of rows that are not read: what they are, and what to do."""
_OTHERS = (
    "file_name", "hf_hub_url", "ms_hub_url", "formatting", "ranking", "subset", "split", "folder", "num_samples",
    "columns", "tags",
)  # fmt: skip


@dataclass(frozen=True)
class DatasetEntry:
    """An entry of dataset_info.json."""

    file: Path
    """The dataset_info.json."""
    name: str
    columns: Mapping[str, str]
    """What keys of rows mean: meaning -> key."""
    roles: Mapping[str, str]
    """Roles of messages: name -> role."""
    path: Path | None = None
    """The file or folder of the rows; None for a dataset of a hub."""
    hub: tuple[str, str] | None = None
    """(hf or ms, name of the dataset)."""
    subset: str | None = None
    split: str | None = None
    folder: str | None = None
    """The folder of a hub dataset that is read."""
    count: int | None = None
    """Number of rows that are read (num_samples)."""
    notes: list[str] = field(default_factory=list)
    """What of the entry is not used."""

    @property
    def title(self) -> str:
        """What messages call it: 'dataset_info.json, identity'."""
        return f"{self.file.name}, {self.name}"


def find_file(location: str) -> Path | None:
    """Return the dataset_info.json of LLaMA-Factory that a location is or holds; None if there is none."""
    path = Path(location).expanduser()
    file = path / FILE_NAME if path.is_dir() else path
    if file.suffix != ".json" or not file.is_file():
        return None
    try:
        entries = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None
    return file if _describes_datasets(entries) else None


def _describes_datasets(value: Any) -> bool:
    places = {"file_name", "hf_hub_url", "ms_hub_url", *REFUSED}
    return isinstance(value, dict) and bool(value) and all(
        isinstance(entry, dict) and entry.keys() & places for entry in value.values()
    )  # fmt: skip


def names_in(file: Path) -> list[str]:
    """Return the names of the datasets that a dataset_info.json describes."""
    return list(json.loads(file.read_text(encoding="utf-8-sig")))


def read_entry(file: Path, name: str, kind: str | None = None, wanted: str = "") -> DatasetEntry:
    """Read one entry.

    Args:
        file: A dataset_info.json.
        name: The name of the dataset.
        kind: The kind of rows that is wanted (row_kinds.py); None if any is.
        wanted: What messages about rows of another kind say is wanted.

    Raises:
        DataError: For an unknown name, an entry that is not read, and rows for another objective.
    """
    entries = json.loads(file.read_text(encoding="utf-8-sig"))
    if name not in entries:
        near = difflib.get_close_matches(name, entries, 1)
        shown = ", ".join([*entries][:SHOWN_NAMES]) + (", ..." if len(entries) > SHOWN_NAMES else "")
        raise DataError(
            f"{file} describes no dataset {name!r}",
            f"Did you mean {near[0]}? It describes {shown}" if near else f"It describes {shown}",
        )
    entry: dict[str, Any] = entries[name]
    title = f"{file.name}, {name}"
    if entry.get("ranking") and kind not in (PAIR, None):
        objectives = KINDS[PAIR].objectives
        raise DataError(
            f"{title} has ranking: true: these are rows for the objectives {', '.join(objectives)}; {wanted}",
            f"Set objective.kind to {' or '.join(objectives)}, or name another dataset",
        )
    form = entry.get("formatting", "alpaca")
    if form not in _FORMATS:
        raise DataError(f"{title}: formatting is {form!r}", f"Known are {', '.join(_FORMATS)}")
    columns = {COLUMNS[key]: value for key, value in _names(entry, "columns", tuple(COLUMNS), title).items()}
    if kind == TEXT and "user" in columns:
        columns["text"] = columns.pop("user")
    tags = _names(entry, "tags", (*TAGS, *ROLE_TAGS), title)
    columns |= {TAGS[key]: value for key, value in tags.items() if key in TAGS}
    roles = {value: ROLE_TAGS[key] for key, value in tags.items() if key in ROLE_TAGS}
    unknown = [key for key in entry if key not in (*_OTHERS, *REFUSED)]
    notes = [f"{title}: not used: {', '.join(unknown)}"] if unknown else []
    count = entry.get("num_samples")
    if count is not None:
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise DataError(f"{title}: num_samples is {count!r}", "Give a whole number of at least 1")
        notes.append(f"{title}: num_samples takes the first {count} rows, where LLaMA-Factory draws them at random")
    path, hub = _find_place(file, entry, title)
    if path is not None:
        unused = [key for key in ("subset", "split", "folder") if entry.get(key)]
        notes += [f"{title}: not used, for the rows are a file: {', '.join(unused)}"] if unused else []
    parts = (entry.get("subset"), entry.get("split"), entry.get("folder"))
    return DatasetEntry(file, name, columns, roles, path, hub, *parts, count, notes)


def _names(entry: Mapping[str, Any], section: str, known: tuple[str, ...], title: str) -> dict[str, str]:
    """Return the names that `columns` or `tags` of an entry give; null gives none."""
    given = entry.get(section) or {}
    if not isinstance(given, dict):
        raise DataError(f"{title}: {section} is not an object", f"Known are {', '.join(known)}")
    for key, value in given.items():
        if key not in known:
            raise DataError(f"{title}: {section} has the unknown key {key!r}", f"Known are {', '.join(known)}")
        if not isinstance(value, str | None):
            raise DataError(f"{title}: {section}.{key} is {value!r}, not a name", "Give the name as a text")
    return {key: value for key, value in given.items() if value}


def _find_place(file: Path, entry: Mapping[str, Any], title: str) -> tuple[Path | None, tuple[str, str] | None]:
    """Return (path, hub dataset) of the rows of an entry; one of them is None."""
    if entry.get("hf_hub_url"):
        return None, ("hf", str(entry["hf_hub_url"]))
    if entry.get("ms_hub_url"):
        return None, ("ms", str(entry["ms_hub_url"]))
    if entry.get("file_name"):
        path = file.parent / str(entry["file_name"])
        if not path.exists():
            raise DataError(f"{title}: there is no file {path}", "Put the file there, or name another dataset")
        return path, None
    for key, (reason, hint) in REFUSED.items():
        if entry.get(key):
            raise DataError(f"{title}: {entry[key]} ({key}) {reason}", hint)
    raise DataError(f"{title} states no file_name", "State where the rows are")
