"""Write one model as several GGUF files, named and numbered as llama.cpp does: NAME-00001-of-00003.gguf and so on.

The first file holds all metadata, and llama.cpp loads the model through it. It is renamed into place last, and an older
one is removed first: at no moment is there a first file whose parts are not all there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.files.hashed_file import joined_hash
from edgetune_converters.gguf.layout import TensorSpec, align, lay_out
from edgetune_converters.gguf.values import Value, ValueKind
from edgetune_converters.gguf.writer import FilePlan, GgufWriter

NUMBER_KEY, COUNT_KEY, TENSORS_KEY = "split.no", "split.count", "split.tensors.count"


@dataclass(frozen=True)
class SplitPlan:
    """The files of a model, none of them opened."""

    files: tuple[FilePlan, ...]

    @classmethod
    def of(
        cls, path: Path, metadata: Mapping[str, Value], tensors: Sequence[TensorSpec], limit: int | None = None
    ) -> Self:
        """Divide the tensors among files of at most `limit` bytes; without a limit there is one file.

        A tensor is never divided: one that is larger than the limit gets a file of its own.
        """
        parts = _partition(metadata, tensors, limit)
        if len(parts) == 1:
            return cls((FilePlan.of(path, metadata, tensors),))
        return cls(
            tuple(
                FilePlan.of(
                    part_path(path, number, len(parts)),
                    {**(metadata if number == 1 else {}), **_split_keys(number - 1, len(parts), len(tensors))},
                    part,
                )
                for number, part in enumerate(parts, 1)
            )
        )

    @property
    def path(self) -> Path:
        """The file, or the first of several."""
        return self.files[0].path

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


class SplitWriter:
    """The files of a model being written; a context manager with the interface of `GgufWriter`.

    The header of the first file is final after `complete_header`, those of the others at once.
    """

    def __init__(self, plan: SplitPlan) -> None:
        self._left = [sum(spec.bytes for spec in file.tensors) for file in plan.files]  # bytes each file still expects
        self._current = 0
        with ExitStack() as stack:
            self._writers = [
                stack.enter_context(GgufWriter(file, header_is_final=number > 0))
                for number, file in enumerate(plan.files)
            ]
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
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
        """Return the SHA-256 of everything after the header; of several files, of their hashes, one a line."""
        return joined_hash([writer.data_hash() for writer in self._writers])

    def complete_header(self, values: Mapping[str, Value]) -> None:
        """Replace values of the metadata by others of the same length."""
        self._writers[0].complete_header(values)

    def verify(self) -> None:
        """Read every file back and compare it with the plan. Raises ArtifactError."""
        for writer in self._writers:
            writer.verify()

    def hash_files(self) -> None:
        """Wait for the hashes of all files."""
        for writer in self._writers:
            writer.hexdigest()

    def publish(self) -> dict[str, str]:
        """Rename all files into place, or none. Return their SHA-256 by name, the first file's first."""
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
    """Return the path of part `number` (from 1) of `count`."""
    return path.with_name(f"{path.name.removesuffix('.gguf')}-{number:05d}-of-{count:05d}.gguf")


def _split_keys(number: int, count: int, tensors: int) -> dict[str, Value]:
    return {
        NUMBER_KEY: Value(ValueKind.U16, number),
        COUNT_KEY: Value(ValueKind.U16, count),
        TENSORS_KEY: Value(ValueKind.I32, tensors),
    }


def _partition(
    metadata: Mapping[str, Value], tensors: Sequence[TensorSpec], limit: int | None
) -> list[list[TensorSpec]]:
    """Return the tensors of each file. The first file also holds the metadata, so it may hold fewer."""
    if limit is None:
        return [list(tensors)]
    parts: list[list[TensorSpec]] = [[]]
    size = _header_size({**metadata, **_split_keys(0, 1, 0)}, [])
    for spec in tensors:
        more = align(spec.bytes) + _header_size({}, [spec])
        if parts[-1] and size + more > limit:
            parts.append([])
            size = _header_size(_split_keys(0, 1, 0), [])
        parts[-1].append(spec)
        size += more
    return parts


def _header_size(metadata: Mapping[str, Value], tensors: Sequence[TensorSpec]) -> int:
    """Return the bytes of a header with these entries, padding included."""
    return len(lay_out(metadata, tensors).header)
