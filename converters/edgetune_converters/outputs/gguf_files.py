"""What outputs in GGUF have in common: one file or several, whose metadata is complete only after the pass."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

from edgetune_converters.gguf import keys
from edgetune_converters.gguf.split import SplitWriter
from edgetune_converters.gguf.values import string
from edgetune_converters.provenance.hashing import InputHashes


class StagedGguf:
    """The part of an `Output` that writes."""

    def __init__(self, writer: SplitWriter) -> None:
        self._writer = writer

    @property
    def path(self) -> Path:
        """The file, or the first of several."""
        return self._writer.path

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return self._writer.size

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)

    def append(self, rows: NDArray[Any]) -> None:
        """Write the next rows."""
        self._writer.append(rows)

    def finish(self, identity: InputHashes) -> None:
        """Write the hashes of the base and of the data, for which there were only places."""
        self._writer.settle(
            {keys.BASE_HASH: string(identity.base_hash), keys.DATA_HASH: string(self._writer.data_hash())}
        )

    def verify(self) -> None:
        """Read the headers back and compare. Errors: ArtifactError."""
        self._writer.verify()

    def hash_files(self) -> None:
        """Wait for the hashes. Errors: OSError when a file cannot be read back."""
        self._writer.hash_files()
