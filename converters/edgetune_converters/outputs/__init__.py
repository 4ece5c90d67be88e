"""What a pass can write: GGUF files, a safetensors directory, a GGUF adapter. Each is an `Output`."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

from numpy.typing import NDArray

from edgetune_converters.merge import Block


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


class Output(Protocol):
    """Something being made. As a context manager it leaves nothing behind unless it was published."""

    @property
    def path(self) -> Path:
        """Where it will be."""

    @property
    def size(self) -> int:
        """Bytes it will have."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def convert(self, index: int, block: Block, threads: int) -> NDArray[Any]:
        """A block of tensor `index` of its stream as it is stored."""

    def append(self, rows: NDArray[Any]) -> None:
        """Write what `convert` gave; blocks come in order."""

    def verify(self) -> None:
        """Read back what was written. Errors: ArtifactError when it is not what was planned."""

    def publish(self) -> Summary:
        """Give it its name."""
