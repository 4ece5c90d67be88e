"""A model in one GGUF file or in several, read as one: the first has the metadata, each some of the tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.errors import ArtifactError
from edgetune_converters.gguf.reader import GgufFile, TensorEntry, read
from edgetune_converters.gguf.split import part_path

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_MAX_PARTS = 4096


@dataclass(frozen=True)
class JoinedFile:
    """All parts of a model. `tensor(name)` gives stored bytes as that of a single file does."""

    files: tuple[GgufFile, ...]

    @property
    def path(self) -> Path:
        """The file through which the model is loaded."""
        return self.files[0].path

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the first part says, without what concerns the parts."""
        return {key: value for key, value in self.files[0].metadata.items() if not key.startswith("split.")}

    @property
    def tensors(self) -> list[TensorEntry]:
        """The tensors of all parts."""
        return [entry for file in self.files for entry in file.tensors]

    def tensor(self, name: str) -> NDArray[np.uint8]:
        """The raw rows of one tensor, uint8 [rows, bytes of a row]; KeyError when there is none of that name."""
        for file in self.files:
            if any(entry.name == name for entry in file.tensors):
                return file.tensor(name)
        raise KeyError(name)


def read_joined(path: Path) -> JoinedFile:
    """Read a file, and where it is the first part of several, the others too.

    Errors: ArtifactError for a part that is not the first, is missing, or is of another model.
    """
    first = read(path)
    count = first.metadata.get("split.count", 1)
    if type(count) is not int or not 0 <= count <= _MAX_PARTS:
        raise ArtifactError(f"{path}: split.count is {count!r}", "the file is damaged: fetch it again")
    if count <= 1:
        return JoinedFile((first,))
    files = (first, *(_part(path, number, count) for number in range(2, count + 1)))
    _check(files)
    return JoinedFile(files)


def _part(path: Path, number: int, count: int) -> GgufFile:
    found = _PART.search(path.name)
    if found is None or int(found[1]) != 1 or int(found[2]) != count:
        raise ArtifactError(
            f"{path} is one part of a split file of {count}, and its name is not that of the first",
            f"Give the first part, named NAME-00001-of-{count:05d}.gguf",
        )
    other = part_path(path.with_name(path.name[: found.start()] + ".gguf"), number, count)
    if not other.is_file():
        raise ArtifactError(f"{other} is missing: {path.name} is the first of {count} parts", "Fetch all parts")
    return read(other)


def _check(files: tuple[GgufFile, ...]) -> None:
    """Errors: ArtifactError where the parts do not say that they belong together."""
    names: dict[str, Path] = {}
    for number, file in enumerate(files):
        said = [file.metadata.get(key) for key in ("split.no", "split.count")]
        if said != [number, len(files)]:
            raise ArtifactError(f"{file.path} says that it is part {said[0]} of {said[1]}, counted from 0")
        for entry in file.tensors:
            if entry.name in names:
                raise ArtifactError(f"the tensor {entry.name!r} is in {names[entry.name].name} and in {file.path.name}")
            names[entry.name] = file.path
    stated = files[0].metadata.get("split.tensors.count", len(names))
    if stated != len(names):
        raise ArtifactError(f"{files[0].path} speaks of {stated} tensors, its parts have {len(names)}")
