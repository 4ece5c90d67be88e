"""Write a GGUF file that appears complete or not at all.

All offsets are known before the first weight. The rows arrive in file order and go to NAME.partial. `complete_header`
fills in metadata that were not known before, `verify` reads the file back and compares it with the plan, and `publish`
renames it into place. Leaving the `with` block without `publish` removes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.errors import ArtifactError
from edgetune_converters.files import atomic
from edgetune_converters.files.hashed_file import HashedFile
from edgetune_converters.gguf.layout import Layout, TensorSpec, align, encode_metadata, lay_out_encoded
from edgetune_converters.gguf.reader import GgufFile, read
from edgetune_converters.gguf.values import Value, as_read


@dataclass(frozen=True)
class FilePlan:
    """A GGUF file that has not been opened: its size and the offset of every tensor are known."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: Sequence[TensorSpec]
    encoded: Mapping[str, bytes]
    layout: Layout

    @classmethod
    def of(cls, path: Path, metadata: Mapping[str, Value], tensors: Sequence[TensorSpec]) -> Self:
        """Encode the metadata and lay out the tensors in the given order."""
        encoded = encode_metadata(metadata)
        return cls(path, metadata, tensors, encoded, lay_out_encoded(encoded, tensors))

    @property
    def size(self) -> int:
        """Bytes of the finished file."""
        return self.layout.size


class GgufWriter:
    """One GGUF file being written; a context manager. `append` takes the row blocks of each tensor in order."""

    def __init__(self, plan: FilePlan, *, header_is_final: bool = True) -> None:
        """Open NAME.partial and write the header. `header_is_final`: `complete_header` will not be called."""
        self.path = plan.path
        self.partial = plan.path.with_name(plan.path.name + atomic.SUFFIX)
        self._plan = plan
        self._metadata = dict(plan.metadata)
        self._header_is_final = header_is_final
        self._current = 0  # index of the tensor whose rows come next
        self._left = plan.tensors[0].bytes if plan.tensors else 0  # bytes of it still to come
        self._published = False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = HashedFile(self.partial, body_start=len(plan.layout.header))
        try:
            self._file.write(plan.layout.header)
            if header_is_final:
                self._file.fix_header()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    @classmethod
    def open(cls, path: Path, metadata: Mapping[str, Value], tensors: Sequence[TensorSpec]) -> Self:
        """Plan and open a file whose metadata are all known."""
        return cls(FilePlan.of(path, metadata, tensors))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if not self._published:
            self.partial.unlink(missing_ok=True)

    def append(self, block: NDArray[np.generic]) -> None:
        """Write the next rows of the current tensor, already in its storage type."""
        if block.nbytes > self._left:
            raise ArtifactError(f"{self.partial}: more rows for tensor {self._current} than its shape has")
        self._file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
        self._left -= block.nbytes
        if self._left == 0:
            self._next_tensor()

    def data_hash(self) -> str:
        """Return the SHA-256 of what was written after the header."""
        return self._file.body_hexdigest()

    def complete_header(self, values: Mapping[str, Value]) -> None:
        """Replace values of the metadata by others of the same length.

        Raises:
            ArtifactError: A value has another length.
        """
        plan = self._plan
        changed = {key: value for key, value in values.items() if self._metadata[key] != value}
        self._metadata |= changed
        header = plan.layout.header
        if changed:
            header = lay_out_encoded({**plan.encoded, **encode_metadata(changed)}, plan.tensors).header
        if len(header) != len(plan.layout.header):
            raise ArtifactError(f"{self.partial}: there is no room for {', '.join(changed)} in the header")
        self._file.fix_header(header if changed else b"")

    def verify(self) -> None:
        """Force the file to disk, read it back and compare it with the plan.

        Raises:
            ArtifactError: The file is not what was planned.
        """
        count = len(self._plan.tensors)
        if self._current != count:
            raise ArtifactError(f"{self.partial}: only {self._current} of {count} tensors were written")
        self._file.sync()
        differences = self._differences(read(self.partial))
        if differences:
            raise ArtifactError.of_many(f"differences between {self.path} and its plan", differences)

    def hexdigest(self) -> str:
        """Return the SHA-256 of the file after the last write. Raises OSError when it cannot be read back."""
        return self._file.hexdigest()

    def publish(self) -> str:
        """Rename the file into place, replacing an older one, and return its SHA-256."""
        digest = self.hexdigest()
        self.partial.replace(self.path)
        self._published = True
        atomic.sync_directory(self.path.parent)
        return digest

    def _next_tensor(self) -> None:
        tensors = self._plan.tensors
        length = tensors[self._current].bytes
        self._file.write(bytes(align(length) - length))
        self._current += 1
        if self._current < len(tensors):
            self._left = tensors[self._current].bytes
        elif self._header_is_final:
            self._file.end()

    def _differences(self, found: GgufFile) -> list[str]:
        """Return what was read back and differs from the plan, one sentence each."""
        plan = self._plan
        planned = [
            (spec.name, spec.shape, spec.type.name, offset)
            for spec, offset in zip(plan.tensors, plan.layout.offsets, strict=True)
        ]
        read_back = [(entry.name, entry.shape, entry.type, entry.offset) for entry in found.tensors]
        problems = [f"planned tensor {a}, found {b}" for a, b in zip(planned, read_back, strict=False) if a != b]
        if len(planned) != len(read_back):
            problems.append(f"planned {len(planned)} tensors, found {len(read_back)}")
        if found.size != plan.size:
            problems.append(f"planned {plan.size} bytes, found {found.size}")
        metadata = {key: as_read(value) for key, value in self._metadata.items()}
        problems += [
            f"metadata {key!r} differs"
            for key in metadata.keys() | found.metadata.keys()
            if metadata.get(key) != found.metadata.get(key)
        ]
        return problems
