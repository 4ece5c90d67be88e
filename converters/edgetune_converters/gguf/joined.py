"""Whether the weights of a GGUF file are those that were written: its metadata carry their hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

from edgetune_converters.errors import ArtifactError
from edgetune_converters.files.hashed_file import joined_hash
from edgetune_converters.gguf import keys, reader
from edgetune_converters.gguf.split import part_path


def check_data(path: Path) -> None:
    """Read all weights and compare. Errors: ArtifactError when they differ, or a part is missing."""
    stated = reader.read(path).metadata.get(keys.DATA_HASH)
    if stated is not None and data_hash(path) != stated:
        raise ArtifactError(
            f"the weights in {path} are not those that were written", "Fetch the file again, or export it again"
        )


def data_hash(path: Path) -> str:
    """SHA-256 of everything after the header; of a split file, of the parts' hashes, a line each."""
    return joined_hash([_after_header(part) for part in _parts(path)])


def _parts(path: Path) -> list[Path]:
    count = reader.read(path).metadata.get("split.count", 1)
    if not isinstance(count, int) or count < 2:
        return [path]
    whole = path.with_name(path.name.rpartition("-00001-of-")[0] + ".gguf")
    return [part_path(whole, number, count) for number in range(1, count + 1)]


def _after_header(path: Path) -> str:
    start = min((entry.offset for entry in reader.read(path).tensors), default=None)
    try:
        with path.open("rb") as stream:
            stream.seek(*((0, 2) if start is None else (start,)))
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
