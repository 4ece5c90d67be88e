"""What went into an artifact, by SHA-256: computed in the background, while the same bytes are merged.

Hashing reads each file from its beginning to its end, so it is also what brings a cold file into the system's cache
ahead of the pass.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from edgetune_converters.adapters import Adapter
from edgetune_converters.checkpoint import Checkpoint
from edgetune_converters.errors import AdapterError, CheckpointError
from edgetune_converters.receipts import combined_hash

_PIECE_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Identity:
    """SHA-256 of every file of the base and of the adapter, by file name."""

    base: Mapping[str, str]
    adapter: Mapping[str, str] | None

    @property
    def base_hash(self) -> str:
        """One hash for the base."""
        return combined_hash(self.base)


class Hashing:
    """Hashes the files of base and adapter on a thread of its own. Leaving the `with` block stops it.

    `expected` maps file names of the base to the hashes that they must have.
    """

    def __init__(self, checkpoint: Checkpoint, adapter: Adapter | None, expected: Mapping[str, str] | None) -> None:
        self._path = checkpoint.path
        self._files = checkpoint.identity_files
        self._expected = expected or {}
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1, "edgetune-hash")
        self._adapter: Future[dict[str, str]] | None = self._pool.submit(adapter.identity) if adapter else None
        self._base: Future[dict[str, str]] = self._pool.submit(self._hash, self._files)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    @property
    def promised(self) -> str | None:
        """The hash of the base, if it is known what it has to be."""
        names = {path.name for path in self._files}
        return combined_hash(self._expected) if names == self._expected.keys() else None

    @property
    def adapter(self) -> dict[str, str] | None:
        """Hashes of the adapter's files."""
        return None if self._adapter is None else self._adapter.result()

    def check(self) -> None:
        """Errors: AdapterError when by now the base is known not to be the one that was expected."""
        if self._base.done():
            self.result()

    def result(self) -> Identity:
        """All hashes. Errors: AdapterError when the base is not the one that was expected."""
        found = self._base.result()
        differing = [name for name, digest in self._expected.items() if found.get(name) != digest]
        if differing:
            raise AdapterError(
                f"{self._path} is not the base the adapter was trained on: {', '.join(sorted(differing))} "
                f"{'differs' if len(differing) == 1 else 'differ'}",
                "Give the base model that the run's manifest names",
            )
        return Identity(found, self.adapter)

    def _hash(self, files: Sequence[Path]) -> dict[str, str]:
        return {path.name: self._digest(path) for path in files}

    def _digest(self, path: Path) -> str:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(_PIECE_BYTES))
        try:
            with path.open("rb", buffering=0) as file:
                if hasattr(os, "posix_fadvise"):  # not everywhere
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                while not self._stop.is_set() and (count := file.readinto(buffer)):
                    digest.update(buffer[:count])
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        return digest.hexdigest()
