"""A reference directory that is being written: streams of columns, checkpoints, and the final rename."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from edgetune.reference.codecs import Columns
from edgetune.reference.manifest import FILE, ReferenceManifest
from edgetune.reference.npy_stream import NpyStream
from edgetune.runs.json_format import write_json

_PROGRESS = "progress.json"
_ANSWERS = "answers.json"
_CAPTURED = ("trained", "base_")  # prefixes of the columns that grow with the work


def stopped_directory(directory: Path) -> Path:
    """Return where a resumable capture works on the reference `directory`."""
    return directory.with_name(f"{directory.name}.stopped.partial")


class PartialReference:
    """The directory of an unfinished reference. With a key, a stopped capture can be resumed."""

    def __init__(self, directory: Path, key: str | None) -> None:
        """Open the directory, or the one that a stopped writer of the same key left: see `positions`."""
        self.directory = directory
        self.key = key
        own = directory.with_name(f"{directory.name}.{os.getpid()}.partial")
        self.path = own if key is None else stopped_directory(directory)
        self.columns: dict[str, NpyStream] = {}
        self.positions = self._resume()
        if not self.positions:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)

    def _resume(self) -> int:
        """Reopen the columns that an earlier writer of this key left; return the number of scored positions."""
        progress = self.path / _PROGRESS
        if self.key is None or not progress.is_file():
            return 0
        try:
            stored = json.loads(progress.read_text(encoding="utf-8"))
            if stored["key"] != self.key:
                return 0
            count = int(stored["positions"])
            for name in stored["columns"]:
                self.columns[name] = NpyStream.reopen(self.path / f"{name}.npy", count)
        except (ValueError, KeyError, TypeError, OSError):
            self.close()
            self.columns = {}
            return 0
        return count

    @property
    def answers_file(self) -> Path | None:
        """Where answers are kept until the reference is complete; None without a key."""
        return None if self.key is None else self.path / _ANSWERS

    def append(self, columns: Columns, total: int) -> None:
        """Append rows to columns of `total` rows."""
        for name, values in columns.items():
            if name not in self.columns:
                shape = (total, *values.shape[1:])
                self.columns[name] = NpyStream(self.path / f"{name}.npy", values.dtype, shape)
            self.columns[name].append(values)

    def read(self, prefix: str, start: int, count: int) -> Columns:
        """Read rows of the columns with a prefix, by their names without it."""
        columns = {name: column for name, column in self.columns.items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): column.read(start, count) for name, column in columns.items()}

    def checkpoint(self, positions: int) -> None:
        """Flush the columns and store the progress: a writer of the same key resumes here."""
        if self.key is None:
            return
        names = [name for name in self.columns if name.startswith(_CAPTURED)]
        for name in names:
            self.columns[name].flush()
        write_json(self.path / _PROGRESS, {"key": self.key, "positions": positions, "columns": names})

    def publish(self, manifest: ReferenceManifest) -> None:
        """Write the manifest with the hashes of the columns, and replace the earlier reference."""
        manifest.files = {name: column.finish() for name, column in self.columns.items()}
        manifest.write(self.path / FILE)
        for name in (_PROGRESS, _ANSWERS):
            (self.path / name).unlink(missing_ok=True)
        old = self.directory.with_name(f"{self.directory.name}.{os.getpid()}.old.partial")
        if self.directory.exists():
            self.directory.replace(old)
        self.path.replace(self.directory)
        shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        """Close the columns; the directory stays."""
        for column in self.columns.values():
            column.stream.close()

    def remove(self) -> None:
        """Remove the directory; an earlier reference stays."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)
