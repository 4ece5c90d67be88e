"""A model in one GGUF file or in several parts, read as one. The first part holds the metadata.

The metadata of a model that edgetune wrote carry a hash of its weights, so that a damaged download is found.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.errors import ArtifactError
from edgetune_converters.files.hashed_file import joined_hash
from edgetune_converters.gguf import keys
from edgetune_converters.gguf.reader import GgufFile, TensorEntry, read
from edgetune_converters.gguf.split import COUNT_KEY, NUMBER_KEY, TENSORS_KEY, part_path

_PART_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_MAX_PARTS = 4096


@dataclass(frozen=True)
class JoinedFile:
    """All parts of a model, with the interface of a single `GgufFile`."""

    files: tuple[GgufFile, ...]

    @property
    def path(self) -> Path:
        """The file that llama.cpp loads the model through."""
        return self.files[0].path

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The metadata of the first part, without the keys about parts."""
        return {key: value for key, value in self.files[0].metadata.items() if not key.startswith("split.")}

    @property
    def tensors(self) -> list[TensorEntry]:
        """The tensors of all parts."""
        return [entry for file in self.files for entry in file.tensors]

    def tensor(self, name: str) -> NDArray[np.uint8]:
        """Return the stored rows of a tensor, uint8 [rows, bytes of a row]. Raises KeyError."""
        for file in self.files:
            if any(entry.name == name for entry in file.tensors):
                return file.tensor(name)
        raise KeyError(name)


def read_joined(path: Path) -> JoinedFile:
    """Read a GGUF file and, where it is the first of several parts, the other parts.

    Raises:
        ArtifactError: The file is damaged, is not the first part, or a part is missing or belongs to another model.
    """
    first = read(path)
    count = first.metadata.get(COUNT_KEY, 1)
    if type(count) is not int or not 0 <= count <= _MAX_PARTS:
        raise ArtifactError(f"{path}: split.count is {count!r}", "the file is damaged: fetch it again")
    if count <= 1:
        return JoinedFile((first,))
    files = (first, *(_read_part(path, number, count) for number in range(2, count + 1)))
    _check_parts(files)
    return JoinedFile(files)


def _read_part(path: Path, number: int, count: int) -> GgufFile:
    found = _PART_NAME.search(path.name)
    if found is None or int(found[1]) != 1 or int(found[2]) != count:
        raise ArtifactError(
            f"{path} is one part of a split file of {count}, and its name is not that of the first",
            f"Give the first part, named NAME-00001-of-{count:05d}.gguf",
        )
    other = part_path(path.with_name(path.name[: found.start()] + ".gguf"), number, count)
    if not other.is_file():
        raise ArtifactError(f"{other} is missing: {path.name} is the first of {count} parts", "Fetch all parts")
    return read(other)


def _check_parts(files: tuple[GgufFile, ...]) -> None:
    """Check that the parts have the right numbers and hold each tensor once."""
    names: dict[str, Path] = {}
    for number, file in enumerate(files):
        found = [file.metadata.get(key) for key in (NUMBER_KEY, COUNT_KEY)]
        if found != [number, len(files)]:
            raise ArtifactError(f"{file.path} is part {found[0]} of {found[1]} by its metadata, counted from 0")
        for entry in file.tensors:
            if entry.name in names:
                raise ArtifactError(f"the tensor {entry.name!r} is in {names[entry.name].name} and in {file.path.name}")
            names[entry.name] = file.path
    expected = files[0].metadata.get(TENSORS_KEY, len(names))
    if expected != len(names):
        raise ArtifactError(f"{files[0].path} promises {expected} tensors, its parts have {len(names)}")


# -- the hash of the weights -------------------------------------------------------------------------------------------


def check_data(path: Path) -> None:
    """Read all weights and compare them with the hash in the metadata, if there is one.

    Raises:
        ArtifactError: The weights differ, or a part is missing.
    """
    expected = read(path).metadata.get(keys.DATA_HASH)
    if expected is not None and data_hash(path) != expected:
        raise ArtifactError(
            f"the weights in {path} are not those that were written", "Fetch the file again, or export it again"
        )


def data_hash(path: Path) -> str:
    """Return the SHA-256 of everything after the header; of a split file, of the parts' hashes, one a line."""
    return joined_hash([_hash_after_header(part) for part in _part_paths(path)])


def _part_paths(path: Path) -> list[Path]:
    count = read(path).metadata.get(COUNT_KEY, 1)
    if not isinstance(count, int) or count < 2:
        return [path]
    single = path.with_name(path.name.rpartition("-00001-of-")[0] + ".gguf")
    return [part_path(single, number, count) for number in range(1, count + 1)]


def _hash_after_header(path: Path) -> str:
    start = min((entry.offset for entry in read(path).tensors), default=None)
    try:
        with path.open("rb") as stream:
            stream.seek(*((0, 2) if start is None else (start,)))
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
