"""A file of answers that is written line by line, has its name when it is complete, and is continued after a stop."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from edgetune.errors import ConfigError
from edgetune_converters.files import atomic

_STATE_SUFFIX = f"{atomic.SUFFIX}.json"


class AnswerFile:
    """Appends lines to NAME.partial, which is renamed to NAME by `finish`. A context manager.

    Attributes:
        done: Lines that an earlier process has written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Open the file.

        Args:
            path: The finished file.
            settings: What the lines depend on, as JSON; a file that was begun with others is not continued.
            overwrite: Whether a finished file is replaced, and one that was begun with other settings is begun again.

        Raises:
            ConfigError: The file exists, was begun with other settings, or is being written.
        """
        self._path = path
        self._partial = path.with_name(path.name + atomic.SUFFIX)
        self._state = path.with_name(path.name + _STATE_SUFFIX)
        if path.is_dir():
            raise ConfigError(f"{path} is a directory", "Give the name of a file with --output")
        if path.exists() and not overwrite:
            raise ConfigError(f"{path} exists", "Give another --output, or --overwrite")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = self._partial.open("ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.done = self._continue(dict(settings), overwrite)
        except BlockingIOError:
            self._file.close()
            raise ConfigError(f"{self._partial} is being written by another process", "Wait for it") from None
        except BaseException:
            self._file.close()
            raise

    def _continue(self, settings: dict[str, Any], overwrite: bool) -> int:
        """Return how many whole lines there are; remove the rest, or all of another file."""
        settings = json.loads(json.dumps(settings, default=str))
        begun = self._read_state()
        if begun is not None and begun != settings and not overwrite:
            names = [name for name in {**begun, **settings} if begun.get(name) != settings.get(name)]
            changes = ", ".join(f"{name} {begun.get(name)!r}, now {settings.get(name)!r}" for name in names)
            raise ConfigError(
                f"{self._partial} was begun with other settings: {changes}",
                "Give the same ones to continue it, or --overwrite to begin again",
            )
        if begun != settings:
            self._file.truncate(0)
            atomic.write_text(self._state, json.dumps(settings) + "\n")
            return 0
        self._file.seek(0)
        done = length = 0
        for line in self._file:
            if line.endswith(b"\n"):
                done, length = done + 1, length + len(line)
        self._file.truncate(length)
        return done

    def _read_state(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self._state.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def write(self, line: str) -> None:
        """Append a line."""
        self._file.write(line.encode("utf-8"))
        self._file.flush()

    def finish(self) -> None:
        """Give the file its name."""
        os.fsync(self._file.fileno())
        self._partial.replace(self._path)
        self._state.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
