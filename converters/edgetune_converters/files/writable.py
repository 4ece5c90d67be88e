"""Whether a directory can be written, asked before the work whose results go there."""

from __future__ import annotations

import tempfile
from pathlib import Path


def existing_parent(path: Path) -> Path:
    """Return the path, or the nearest directory above it that exists."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def why_not_writable(path: Path) -> str | None:
    """Return why nothing can be created at a path, which need not exist, in words; None if something can be.

    A directory is created and removed: permissions alone do not tell of a read-only disk or a network file system.
    """
    place = existing_parent(path)
    if not place.is_dir():
        return f"{place} is a file"
    try:
        Path(tempfile.mkdtemp(prefix=".edgetune-", dir=place)).rmdir()
    except OSError as error:
        return f"{place}: {(error.strerror or str(error)).lower()}"
    return None
