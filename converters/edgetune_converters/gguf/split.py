"""One model over several GGUF files, as llama.cpp names and numbers them: NAME-00001-of-00003.gguf and so on.

The first file holds all metadata, and llama.cpp loads the model through it. So it is the last to get its name, and an
old one is the first to lose it: at no moment does a first file stand for parts that are not all there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.files.hashed_file import joined_hash
from edgetune_converters.gguf.layout import TensorSpec, align, lay_out
from edgetune_converters.gguf.values import Value, ValueKind
from edgetune_converters.gguf.writer import GgufWriter


class SplitWriter:
    """Writes like `GgufWriter`, into as many files as `limit` bytes for each ask for; without a limit into one.

    A tensor is never cut: one that is larger than the limit has a file to itself. All metadata is in the first file, so
    only that one is not `settled`.
    """

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, Value],
        tensors: Sequence[TensorSpec],
        limit: int | None = None,
        *,
        settled: bool = True,
    ) -> None:
        parts = _partition(metadata, tensors, limit)
        self._writers = _writers(path, metadata, parts, settled)
        self._left = [sum(spec.bytes for spec in part) for part in parts]  # bytes that each file still expects
        self._current = 0
        self._open = ExitStack()

    @property
    def path(self) -> Path:
        """The file, or the first of several."""
        return self._writers[0].path

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(writer.size for writer in self._writers)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for writer in self._writers:
                stack.enter_context(writer)
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def append(self, block: NDArray[np.generic]) -> None:
        """Write the next rows of the current tensor, already in its storage type."""
        while not self._left[self._current] and self._current + 1 < len(self._writers):
            self._current += 1
        self._writers[self._current].append(block)
        self._left[self._current] -= block.nbytes

    def data_hash(self) -> str:
        """SHA-256 of everything after the header; of several files, of their hashes, a line each."""
        return joined_hash([writer.data_hash() for writer in self._writers])

    def settle(self, values: Mapping[str, Value]) -> None:
        """Replace values of the metadata by others of the same length."""
        self._writers[0].settle(values)

    def verify(self) -> None:
        """Read every file back and compare it with the plan. Errors: ArtifactError."""
        for writer in self._writers:
            writer.verify()

    def hash_files(self) -> None:
        """Wait for the hashes of all files."""
        for writer in self._writers:
            writer.hexdigest()

    def publish(self) -> dict[str, str]:
        """Give the files their names, all or none. Returns their SHA-256 by name, the first file's first."""
        first, *rest = self._writers
        hashes: dict[str, str] = {}
        if rest:
            first.path.unlink(missing_ok=True)
        try:
            for writer in (*rest, first):
                hashes[writer.path.name] = writer.publish()
        except BaseException:
            for name in hashes:
                (first.path.parent / name).unlink(missing_ok=True)
            raise
        return {writer.path.name: hashes[writer.path.name] for writer in self._writers}


def part_path(path: Path, number: int, count: int) -> Path:
    """The name of part `number` (from 1) of `count`."""
    return path.with_name(f"{path.name.removesuffix('.gguf')}-{number:05d}-of-{count:05d}.gguf")


def _writers(
    path: Path, metadata: Mapping[str, Value], parts: Sequence[Sequence[TensorSpec]], settled: bool
) -> list[GgufWriter]:
    if len(parts) == 1:
        return [GgufWriter(path, metadata, parts[0], settled=settled)]
    tensors = sum(map(len, parts))
    return [
        GgufWriter(
            part_path(path, number, len(parts)),
            {**(metadata if number == 1 else {}), **_keys(number - 1, len(parts), tensors)},
            part,
            settled=settled or number > 1,
        )
        for number, part in enumerate(parts, 1)
    ]


def _keys(number: int, count: int, tensors: int) -> dict[str, Value]:
    return {
        "split.no": Value(ValueKind.U16, number),
        "split.count": Value(ValueKind.U16, count),
        "split.tensors.count": Value(ValueKind.I32, tensors),
    }


def _partition(
    metadata: Mapping[str, Value], tensors: Sequence[TensorSpec], limit: int | None
) -> list[list[TensorSpec]]:
    """The tensors of each file. The first begins with the metadata, so it may hold fewer."""
    if limit is None:
        return [list(tensors)]
    parts: list[list[TensorSpec]] = [[]]
    size = _overhead({**metadata, **_keys(0, 1, 0)}, [])
    for spec in tensors:
        more = align(spec.bytes) + _overhead({}, [spec])
        if parts[-1] and size + more > limit:
            parts.append([])
            size = _overhead(_keys(0, 1, 0), [])
        parts[-1].append(spec)
        size += more
    return parts


def _overhead(metadata: Mapping[str, Value], tensors: Sequence[TensorSpec]) -> int:
    """Bytes of the header with these entries, padding included."""
    return len(lay_out(metadata, tensors).header)
