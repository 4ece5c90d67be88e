"""The outputs of the merged model before its conversion, stored beside the reference.

One .npz file for each merge base: `original`, the adapter on the base as it is stored, and `nf4`, the adapter on the
base quantized to 4 bits as in training. A file belongs to one reference.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from edgetune.errors import RunDirectoryError
from edgetune.reference.codecs import StoredComparison
from edgetune.reference.store import Reference
from edgetune_converters.files import atomic
from edgetune_converters.names import MERGE_BASES, NF4, ORIGINAL

__all__ = ["MERGE_BASES", "path_of", "read", "write"]

_ARRAYS = ("kld", "top", "nll")
_EARLIER = {ORIGINAL: "merged-w16.npz", NF4: "merged-nf4.npz"}
"""File names of edgetune before 0.1."""


def path_of(directory: Path, merge_base: str) -> Path:
    """Return the path of the stored outputs in a reference directory."""
    path = directory / f"merged-{merge_base}.npz"
    earlier = directory / _EARLIER.get(merge_base, path.name)
    return earlier if earlier.is_file() and not path.is_file() else path


def write(reference: Reference, merge_base: str, compared: StoredComparison) -> Path:
    """Store the outputs, atomically, and return their path."""
    path = reference.directory / f"merged-{merge_base}.npz"
    with atomic.replacing(path) as temporary, temporary.open("wb") as stream:
        arrays = {array: getattr(compared, array) for array in _ARRAYS}
        np.savez(stream, allow_pickle=False, digest=np.array(reference.digest), **arrays)
    return path


def read(reference: Reference, merge_base: str) -> StoredComparison | None:
    """Return the stored outputs, or None.

    Raises:
        RunDirectoryError: The file is damaged or belongs to another reference.
    """
    path = path_of(reference.directory, merge_base)
    if not path.is_file():
        return None
    hint = f"Capture it again: `edgetune reference RUN --merged {merge_base}`"
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            digest, arrays = str(stored["digest"]), [np.array(stored[array]) for array in _ARRAYS]
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise RunDirectoryError(f"{path} is damaged: {error}", hint) from None
    if digest != reference.digest or any(len(array) != len(reference.rows.positions) for array in arrays):
        raise RunDirectoryError(f"{path} belongs to another reference", hint)
    return StoredComparison(*arrays)
