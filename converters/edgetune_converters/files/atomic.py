"""Atomic writes: a reader sees the old file or the new one, never a part of it.

The content goes to a temporary file beside the target, which is then renamed into place. Its name holds the process id,
so that two processes which write the same file do not disturb each other.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SUFFIX = ".partial"
"""Of everything that is not finished."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file; rename it to `path` when the block ends, remove it when the block fails.

    The directory of `path` is created where it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{SUFFIX}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write `text` as UTF-8; `errors` as in `str.encode`."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", errors))


@contextmanager
def temporary_directory(path: Path, suffix: str = SUFFIX) -> Iterator[Path]:
    """Yield an empty directory beside `path`, named NAME.partial, and remove it in every case.

    One that a killed process left is removed first.
    """
    directory = path.with_name(path.name + suffix)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def sync_directory(directory: Path) -> None:
    """Force a rename in `directory` to disk, so that it survives a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
