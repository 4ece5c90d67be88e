"""What a pass can write: GGUF files, a safetensors directory, a GGUF adapter. Each is an `Output`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

from edgetune_converters.merging.stream import MakeBlock, RowBlock
from edgetune_converters.provenance.hashing import InputHashes
from edgetune_converters.reading.checkpoint import Checkpoint


class Summary(NamedTuple):
    """What the receipt says of an output alone. `files` maps names to SHA-256 where it is more than one file."""

    artifact: Path
    sha256: str
    size: int
    format: str
    recipe: str
    types: dict[str, int]
    tensors: dict[str, str]
    weights: int
    bits_per_weight: float
    fallback_share: float = 0.0
    survival: dict[str, float] | None = None
    files: dict[str, str] = {}  # noqa: RUF012 - a NamedTuple's default is never changed
    overrides: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    imatrix: dict[str, str] | None = None
    type_search: dict[str, Any] | None = None


class StreamTensor(Protocol):
    """A tensor of a pass."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As numpy says it."""

    @property
    def sources(self) -> set[str]:
        """The base's tensors from which it is made."""

    @property
    def source_bytes(self) -> int:
        """Bytes that are read for it."""

    def pieces(self, checkpoint: Checkpoint) -> Iterator[MakeBlock]:
        """Its blocks in order, each to be made on any thread."""


class Output(Protocol):
    """Something being made. As a context manager it leaves nothing behind unless it was published."""

    @property
    def path(self) -> Path:
        """Where it will be."""

    @property
    def size(self) -> int:
        """Bytes it will have."""

    @property
    def tensors(self) -> Sequence[StreamTensor]:
        """What it takes from the pass, in this order. Outputs that have the same list share each block."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def convert(self, index: int, block: RowBlock, threads: int) -> Any:
        """A block of tensor `index` as it is stored. Called on several threads, for blocks in any order."""

    def append(self, rows: Any) -> None:
        """Write what `convert` gave; blocks come in order."""

    def finish(self, identity: InputHashes) -> None:
        """All blocks have come, and the base's hashes are known: write what is left, and force it to disk."""

    def verify(self) -> None:
        """Read back what was written. Errors: ArtifactError when it is not what was planned."""

    def hash_files(self) -> None:
        """Take the hashes of all files, so that nothing of `publish` takes long."""

    def publish(self) -> Summary:
        """Give it its name."""
