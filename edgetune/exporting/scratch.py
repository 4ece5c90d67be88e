"""Temporary directories for what is exported only to be measured or rewritten."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def temporary_sibling(path: Path, purpose: str = "") -> Iterator[Path]:
    """Make the directory PATH.PURPOSE.partial, on the disk of the artifact, and remove it in every case.

    A directory of this name that a killed export has left is removed first.
    """
    ending = f".{purpose}.partial" if purpose else ".partial"
    folder = path.resolve().with_name(path.name + ending)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
