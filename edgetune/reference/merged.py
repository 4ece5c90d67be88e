"""What the merged model says before it is converted: the rung between training and export, kept beside the reference.

Two of them (DESIGN, section 3, "Merge base"): `w16`, the adapter on the base as it is, and `nf4`, the adapter on the
base rounded to 4 bits as it was while training. Each is one .npz file that belongs to one reference.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from edgetune.errors import RunDirectoryError
from edgetune.reference.codecs import Comparison
from edgetune.reference.store import Reference
from edgetune_converters.names import MergeBaseName

MERGED: dict[str, MergeBaseName] = {"w16": "original", "nf4": "nf4"}
"""Name -> `merge_base` of the export."""
_ARRAYS = ("kld", "top", "nll")


def path_of(directory: Path, name: str) -> Path:
    """Where it lies in a reference directory."""
    return directory / f"merged-{name}.npz"


def write(reference: Reference, name: str, compared: Comparison) -> Path:
    """Store it, whole or not at all."""
    path = path_of(reference.directory, name)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as stream:
            arrays = {array: getattr(compared, array) for array in _ARRAYS}
            np.savez(stream, allow_pickle=False, digest=np.array(reference.digest), **arrays)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read(reference: Reference, name: str) -> Comparison | None:
    """What was stored, None where nothing was. Raises RunDirectoryError for a damaged file or another reference's."""
    path = path_of(reference.directory, name)
    if not path.is_file():
        return None
    hint = f"Write it again: edgetune reference RUN --merged {name}."
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            digest, arrays = str(stored["digest"]), [np.array(stored[array]) for array in _ARRAYS]
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise RunDirectoryError(f"{path} is damaged: {error}", hint) from None
    if digest != reference.digest or any(len(array) != len(reference.rows.positions) for array in arrays):
        raise RunDirectoryError(f"{path} belongs to another reference", hint)
    return Comparison(*arrays)
