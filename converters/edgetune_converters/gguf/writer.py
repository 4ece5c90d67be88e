"""Writing a GGUF file so that it either appears whole or not at all.

All offsets are known beforehand; the rows arrive in file order and go to NAME.partial. `settle` completes the metadata
where a value of it was not known before, `verify` reads that file back and compares it with what was asked for; only
then `publish` renames it. Leaving the `with` block otherwise removes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.errors import ArtifactError
from edgetune_converters.files import atomic
from edgetune_converters.files.hashed_file import HashedFile
from edgetune_converters.gguf.layout import TensorSpec, align, encode_metadata, lay_out_encoded
from edgetune_converters.gguf.reader import GgufFile, read
from edgetune_converters.gguf.values import Value, as_read


class GgufWriter:
    """One GGUF file being written. Use as a context manager; call `append` for each tensor's row blocks in order."""

    def __init__(
        self, path: Path, metadata: Mapping[str, Value], tensors: Sequence[TensorSpec], *, settled: bool = True
    ) -> None:
        """`settled` says that no value of the metadata will change."""
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self._metadata = dict(metadata)
        self._tensors = tensors
        self._encoded = encode_metadata(metadata)
        self._layout = lay_out_encoded(self._encoded, tensors)
        self._settled = settled
        self._current = 0  # index of the tensor whose rows come next
        self._left = tensors[0].bytes if tensors else 0  # bytes of it still to come
        self._file: HashedFile | None = None
        self._published = False

    @property
    def size(self) -> int:
        """Bytes of the finished file."""
        return self._layout.size

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = HashedFile(self.partial, body=len(self._layout.header))
        self._file.write(self._layout.header)
        if self._settled:
            self._file.settle()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if not self._published:
            self.partial.unlink(missing_ok=True)

    def append(self, block: NDArray[np.generic]) -> None:
        """Write the next rows of the current tensor, already in its storage type."""
        if block.nbytes > self._left:
            raise ArtifactError(f"{self.partial}: more rows for tensor {self._current} than its shape says")
        self._put(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
        self._left -= block.nbytes
        if self._left == 0:
            self._next_tensor()

    def data_hash(self) -> str:
        """SHA-256 of what was written after the header."""
        assert self._file is not None
        return self._file.body_hexdigest()

    def settle(self, values: Mapping[str, Value]) -> None:
        """Replace values of the metadata by others of the same length. Errors: ArtifactError."""
        assert self._file is not None
        changed = {key: value for key, value in values.items() if self._metadata[key] != value}
        self._metadata |= changed
        layout = lay_out_encoded(self._encoded | encode_metadata(changed), self._tensors) if changed else self._layout
        if len(layout.header) != len(self._layout.header):
            raise ArtifactError(f"{self.partial}: there is no room for {', '.join(changed)} in the header")
        self._file.settle(layout.header if changed else b"")

    def verify(self) -> None:
        """Force the file to disk, read it back and compare it with the plan. Errors: ArtifactError."""
        assert self._file is not None
        if self._current != len(self._tensors):
            raise ArtifactError(f"{self.partial}: only {self._current} of {len(self._tensors)} tensors were written")
        self._file.sync()
        differences = self._differences(read(self.partial))
        if differences:
            raise ArtifactError.of_many(f"differences between {self.path} and its plan", differences)

    def hexdigest(self) -> str:
        """SHA-256 of the file, after the last write. Errors: OSError when it cannot be read back."""
        assert self._file is not None
        return self._file.hexdigest()

    def publish(self) -> str:
        """Give the file its name, replacing one that was there. Returns its SHA-256."""
        digest = self.hexdigest()
        self.partial.replace(self.path)
        self._published = True
        atomic.sync_directory(self.path.parent)
        return digest

    def _put(self, data: bytes | memoryview) -> None:
        assert self._file is not None
        self._file.write(data)

    def _next_tensor(self) -> None:
        length = self._tensors[self._current].bytes
        self._put(bytes(align(length) - length))
        self._current += 1
        if self._current < len(self._tensors):
            self._left = self._tensors[self._current].bytes
        elif self._settled and self._file is not None:
            self._file.end()

    def _differences(self, found: GgufFile) -> list[str]:
        """What was read back and is not what was planned, a sentence each."""
        wanted = [
            (spec.name, spec.shape, spec.type.name, offset)
            for spec, offset in zip(self._tensors, self._layout.offsets, strict=True)
        ]
        got = [(entry.name, entry.shape, entry.type, entry.offset) for entry in found.tensors]
        problems = [f"planned tensor {a}, found {b}" for a, b in zip(wanted, got, strict=False) if a != b]
        if len(wanted) != len(got):
            problems.append(f"planned {len(wanted)} tensors, found {len(got)}")
        if found.size != self.size:
            problems.append(f"planned {self.size} bytes, found {found.size}")
        plain = {key: as_read(value) for key, value in self._metadata.items()}
        problems += [
            f"metadata {key!r} differs"
            for key in plain.keys() | found.metadata.keys()
            if plain.get(key) != found.metadata.get(key)
        ]
        return problems
