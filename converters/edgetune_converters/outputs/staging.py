"""A directory that is written under a temporary name and renamed into place when it is complete.

The promise of an export, complete or not at all, is kept here for every output that is a directory: safetensors, ONNX
and traced ONNX.
"""

from __future__ import annotations

import shutil
from abc import abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from edgetune_converters.errors import EdgetuneError
from edgetune_converters.files import atomic
from edgetune_converters.files.contents import sha256_of
from edgetune_converters.outputs.base import Output, OutputSummary
from edgetune_converters.provenance.receipts import combined_hash


@dataclass(frozen=True)
class DirectoryKind:
    """What a directory is, and how an older one is recognized that an export may replace."""

    name: str
    """With its article: "an ONNX model"."""
    is_exported: Callable[[Path], bool]
    """Whether edgetune wrote the directory. Read from the files themselves: a killed export leaves no receipt."""

    def check_replaceable(self, path: Path) -> None:
        """Check that the export may write to `path`.

        Raises:
            EdgetuneError: Something is there that an export must not remove.
        """
        if path.is_dir() and any(path.iterdir()) and not self.is_exported(path):
            raise EdgetuneError(
                f"{path} is a directory that was not made by an export: it is not replaced",
                "Choose another name with -o",
            )
        if path.is_file():
            raise EdgetuneError(f"{path} is a file; {self.name} is a directory", "Choose another name with -o")


class StagedDirectory:
    """The directory NAME.partial, which becomes NAME; a context manager.

    Entering removes one that a killed export left. Leaving without `publish` removes the directory.
    """

    def __init__(self, path: Path, kind: DirectoryKind) -> None:
        self.path = path
        self.partial = path.with_name(path.name + atomic.SUFFIX)
        self.hashes: dict[str, str] = {}
        """SHA-256 by name relative to the directory. A hash that is known beforehand may be added."""
        self._kind = kind
        self._published = False

    def __enter__(self) -> Self:
        if self.partial.is_dir():
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._published:
            shutil.rmtree(self.partial, ignore_errors=True)

    def hash_all(self) -> None:
        """Compute the hashes of the files that have none yet."""
        for path in self.partial.rglob("*"):
            name = path.relative_to(self.partial).as_posix()
            if path.is_file() and name not in self.hashes:
                self.hashes[name] = sha256_of(path)
        self.hashes = dict(sorted(self.hashes.items()))

    @property
    def sha256(self) -> str:
        """One hash for all files."""
        return combined_hash(self.hashes)

    def publish(self) -> None:
        """Rename the directory into place; an older one that an export wrote is replaced. Raises EdgetuneError."""
        self._kind.check_replaceable(self.path)
        atomic.replace_directory(self.partial, self.path)
        self._published = True


class DirectoryOutput(Output):
    """An output that is a directory."""

    def __init__(self, path: Path, kind: DirectoryKind) -> None:
        self._staged = StagedDirectory(path, kind)

    @property
    def path(self) -> Path:
        return self._staged.path

    @property
    def partial(self) -> Path:
        """Path of the directory until it is renamed into place."""
        return self._staged.partial

    def __enter__(self) -> Self:
        with ExitStack() as stack:  # an error on the way removes the directory
            stack.enter_context(self._staged)
            self._open_files()
            stack.callback(self._close_files)
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.__exit__(kind, error, trace)

    def _open_files(self) -> None:
        """Open the files that the pass writes."""

    def _close_files(self) -> None:
        """Close them; called in every case."""

    def hash_files(self) -> None:
        self._staged.hash_all()

    def publish(self) -> OutputSummary:
        self._staged.publish()
        return self._summary()

    @abstractmethod
    def _summary(self) -> OutputSummary:
        """Return the receipt's entries about the directory."""
