"""SHA-256 of the inputs of an export, computed in the background while the same bytes are merged.

Hashing reads each file from beginning to end, and so brings a cold file into the page cache ahead of the pass. It stays
at most 256 MB ahead, and the pages that both have read are dropped from the cache.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from edgetune_converters.adapters.adapter import Adapter
from edgetune_converters.errors import AdapterError, CheckpointError
from edgetune_converters.provenance.receipts import combined_hash
from edgetune_converters.reading.checkpoint import Checkpoint

_PIECE_BYTES = 4 * 1024 * 1024
_AHEAD_BYTES = 256 * 1024 * 1024  # enough for neither disk nor processor to wait
_LOOK_SECONDS = 0.005  # polling interval: the time to hash 10 MB


@dataclass(frozen=True)
class InputHashes:
    """SHA-256 of every file of the base and of the adapter, by file name."""

    base: Mapping[str, str]
    adapter: Mapping[str, str] | None

    @property
    def base_hash(self) -> str:
        """One hash for all files of the base."""
        return combined_hash(self.base)


class InputHasher:
    """Hashes the files of base and adapter on a thread of its own. Leaving the `with` block stops the thread."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        adapter: Adapter | None,
        expected: Mapping[str, str] | None,
        expected_adapter: Mapping[str, str] | None = None,
    ) -> None:
        """Start hashing. `expected` and `expected_adapter` map file names to the hashes that they must have."""
        self._path = checkpoint.path
        self._adapter_path = adapter.path if adapter else None
        self._expected_adapter = expected_adapter or {}
        self._files = checkpoint.identity_files
        self._expected = expected or {}
        self._stop = threading.Event()
        self._hurry = threading.Event()  # hash on without waiting for the pass
        self._pages = {path: pages for path in self._files if (pages := checkpoint.pages(path))}
        self._hashed = 0
        self._pool = ThreadPoolExecutor(1, "edgetune-hash")
        self._adapter: Future[dict[str, str]] | None = self._pool.submit(adapter.identity) if adapter else None
        self._base: Future[dict[str, str]] = self._pool.submit(self._hash, self._files)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._hurry.set()
        self._pool.shutdown(cancel_futures=True)
        for pages in self._pages.values():
            pages.close()

    @property
    def expected_base_hash(self) -> str | None:
        """The expected hash of the base, where the hash of each of its files is expected; otherwise None."""
        names = {path.name for path in self._files}
        return combined_hash(self._expected) if names == self._expected.keys() else None

    @property
    def adapter(self) -> dict[str, str] | None:
        """Hashes of the adapter's files by name. Waits for them.

        Raises:
            AdapterError: It is not the adapter that was expected.
        """
        if self._adapter is None:
            return None
        found = self._adapter.result()
        differing = changed_files(self._expected_adapter, found)
        if differing:
            raise AdapterError(
                f"{self._adapter_path} is not the adapter that was trained: {_listed(differing)}",
                "Restore it, or train again",
            )
        return found

    def check(self) -> None:
        """Raise AdapterError if the hashes known so far differ from the expected ones."""
        if self._adapter is not None and self._adapter.done():
            _ = self.adapter
        if self._base.done():
            self.result()

    def result(self) -> InputHashes:
        """Wait for all hashes and return them.

        Raises:
            AdapterError: Base or adapter are not those that were expected.
        """
        self._hurry.set()
        found = self._base.result()
        differing = [name for name, digest in self._expected.items() if found.get(name) != digest]
        if differing:
            raise AdapterError(
                f"{self._path} is not the base the adapter was trained on: {_listed(sorted(differing))}",
                "Give the base model that the run's manifest names",
            )
        return InputHashes(found, self.adapter)

    def _hash(self, files: Sequence[Path]) -> dict[str, str]:
        dropping = [pages.follow() for pages in self._pages.values()]
        if not any(dropping):
            self._hurry.set()
        return {path.name: self._digest(path) for path in files}

    def _digest(self, path: Path) -> str:
        digest, buffer, position = hashlib.sha256(), memoryview(bytearray(_PIECE_BYTES)), 0
        pages = self._pages.get(path)
        try:
            with path.open("rb", buffering=0) as file:
                while not self._stop.is_set() and (count := file.readinto(buffer)):
                    digest.update(buffer[:count])
                    self._hashed += count
                    position += count
                    if pages:
                        pages.followed(position)
                        self._wait()
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        return digest.hexdigest()

    def _wait(self) -> None:
        """Wait until the pass has come near enough, or is over."""
        while self._hashed - sum(pages.passed_bytes for pages in self._pages.values()) > _AHEAD_BYTES:
            if self._hurry.wait(_LOOK_SECONDS):
                return


def changed_files(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Return the names of the files whose hash differs from the expected one."""
    return sorted(name for name, digest in found.items() if expected.get(name, digest) != digest)


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names)} {'differs' if len(names) == 1 else 'differ'}"
