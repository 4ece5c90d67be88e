"""Atomic writes: a reader sees the old file or the new one, never a part of it.

The content goes to a temporary file beside the target, which is then renamed into place. Its name holds the process id,
so that two processes which write the same file do not disturb each other.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SUFFIX = ".partial"
"""Of everything that is not finished."""
_REPLACED_SUFFIX = ".replaced"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h


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


def replace_directory(new: Path, path: Path) -> None:
    """Rename the directory `new` to `path`; an older directory of that name is removed.

    Where the system can exchange two names, one of the two directories has the name at every moment. Elsewhere the
    older one is renamed first.
    """
    aside = path.with_name(path.name + _REPLACED_SUFFIX)
    if aside.is_dir():
        shutil.rmtree(aside)
    if path.is_dir() and exchange_names(new, path):
        shutil.rmtree(new, ignore_errors=True)  # the older directory has this name now
        return
    if path.is_dir():
        path.rename(aside)
    new.rename(path)
    shutil.rmtree(aside, ignore_errors=True)


def exchange_names(one: Path, other: Path) -> bool:
    """Exchange two names in one step with Linux's renameat2(2); False where the system or file system cannot."""
    function = getattr(ctypes.CDLL(None), "renameat2", None)
    if function is None:
        return False
    paths = os.fsencode(one.absolute()), os.fsencode(other.absolute())
    done: int = function(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE)
    return done == 0


def sync_directory(directory: Path) -> None:
    """Force a rename in `directory` to disk, so that it survives a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
