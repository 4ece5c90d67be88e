"""A lock on a run directory, so that one process at a time writes there.

The lock is flock(2) on the file run.lock: the operating system releases it however the process ends. The text in the
file (the writer and its process id) is for people. Where the operating system or the file system has no such locks,
nothing is locked.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgetune.errors import RunDirectoryError

FILE = "run.lock"


@contextmanager
def writing(run: Path, writer: str) -> Iterator[None]:
    """Hold the lock; `writer` is named in the errors of other processes, for instance "a training".

    Raises:
        RunDirectoryError: Another process holds the lock.
    """
    run.mkdir(parents=True, exist_ok=True)
    path = run / FILE
    file = _acquire(path)
    if file is None:
        raise _locked_error(run)
    try:
        os.ftruncate(file, 0)
        os.write(file, f"{writer} {os.getpid()}\n".encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # before the lock is released: `_acquire` checks that its file still has this name
        os.close(file)


def is_written(run: Path) -> bool:
    """Whether another process holds the lock."""
    path = run / FILE
    if not path.is_file() or _read_writer(path)[1] == str(os.getpid()):
        return False
    with contextlib.suppress(PermissionError, FileNotFoundError):
        file = os.open(path, os.O_RDWR)
        try:
            return not _try_lock(file)
        finally:
            os.close(file)
    return False


def refuse_if_written(run: Path) -> None:
    """Raise RunDirectoryError if another process holds the lock."""
    if is_written(run):
        raise _locked_error(run)


def _acquire(path: Path) -> int | None:
    """Return the open, locked file; None if another process has the lock."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _try_lock(file):
                os.close(file)
                return None
            if os.fstat(file).st_ino == path.stat().st_ino:
                return file
        except FileNotFoundError:
            pass
        os.close(file)  # its previous holder has just removed the file


def _try_lock(file: int) -> bool:
    """Lock the file without waiting. True as well where there are no locks."""
    try:
        fcntl = importlib.import_module("fcntl")
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems
        return True
    return True


def _read_writer(path: Path) -> tuple[str, str]:
    """Return the writer and its process id from the text of the file."""
    try:
        writer, _, number = path.read_text(encoding="utf-8").strip().rpartition(" ")
    except (OSError, UnicodeDecodeError):
        return "", ""
    return writer, number


def _locked_error(run: Path) -> RunDirectoryError:
    writer, number = _read_writer(run / FILE)
    return RunDirectoryError(
        f"{writer or 'a process'} (pid {number or 'unknown'}) is writing in {run}",
        "Wait until it has finished, or stop it with Ctrl-C",
    )
