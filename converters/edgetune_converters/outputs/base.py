"""The interface of everything that an export writes.

An output is staged under a temporary name, verified, and renamed into place when all outputs of the export are
complete. `exporting.py` drives all of them through the same steps:

    with output:                    stage
        output.append(...)          while the pass runs (StreamedOutput only)
        output.finish(inputs)
        output.verify()
        output.hash_files()
        output.publish()            rename; without it nothing is left behind
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

from edgetune_converters.merging.stream import MakeBlock, RowBlock
from edgetune_converters.provenance.hashing import InputHashes
from edgetune_converters.reading.checkpoint import Checkpoint


class OutputSummary(NamedTuple):
    """The entries of a receipt that depend on the output alone; see `Receipt`."""

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
    exporter: str | None = None
    exporter_kld: float | None = None
    lora_error: dict[str, float] | None = None
    versions: dict[str, str] = {}  # noqa: RUF012 - beside those of `tool_versions`


class StreamTensor(Protocol):
    """A tensor of the streaming pass."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as in NumPy."""

    @property
    def sources(self) -> set[str]:
        """The base's tensors that it is made of."""

    @property
    def source_bytes(self) -> int:
        """Bytes that are read for it."""

    def pieces(self, checkpoint: Checkpoint) -> Iterator[MakeBlock]:
        """Yield functions that make its blocks of rows in order, each on any thread."""


class Output(ABC):
    """One artifact being written. Leaving the `with` block without `publish` removes all traces of it."""

    @property
    @abstractmethod
    def path(self) -> Path:
        """Path of the finished file or directory."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Bytes that it will have on disk."""

    @abstractmethod
    def __enter__(self) -> Self:
        """Create the temporary file or directory."""

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove it, unless it has been renamed into place."""

    @abstractmethod
    def finish(self, inputs: InputHashes) -> None:
        """Write what is left after the pass, now that the hashes of the inputs are known."""

    @abstractmethod
    def verify(self) -> None:
        """Force the files to disk, read them back and compare them with the plan.

        Raises:
            ArtifactError: They are not what was planned.
        """

    @abstractmethod
    def hash_files(self) -> None:
        """Compute the hashes of all files, so that `publish` takes no time."""

    @abstractmethod
    def publish(self) -> OutputSummary:
        """Rename the output into place."""


class StreamedOutput(Output):
    """An output whose tensors come from the streaming pass."""

    @property
    @abstractmethod
    def tensors(self) -> Sequence[StreamTensor]:
        """The tensors it takes, in this order. Outputs that return the same objects share their blocks."""

    @abstractmethod
    def convert(self, index: int, block: RowBlock, threads: int) -> Any:
        """Return a block of tensor `index` as it is stored. Called on several threads, for blocks in any order."""

    @abstractmethod
    def append(self, rows: Any) -> None:
        """Write what `convert` returned; blocks come in order."""
