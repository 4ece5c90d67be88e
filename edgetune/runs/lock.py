"""One writer at a time: a lock on a run directory for as long as a process writes there.

The lock is flock(2) on the file run.lock, so the system lets go of it however the process ends; what the file says
(who, and the process's number) is for people. Where the system or the file system has no such locks, nothing is locked.
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
def writing(run: Path, who: str) -> Iterator[None]:
    """Hold the lock; `who` is said to others, for instance "a training". Errors: RunDirectoryError when it is held."""
    run.mkdir(parents=True, exist_ok=True)
    path = run / FILE
    file = _locked(path)
    if file is None:
        raise _held(run)
    try:
        os.ftruncate(file, 0)
        os.write(file, f"{who} {os.getpid()}\n".encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # before it is let go: `_locked` looks whether its file is still the one of this name
        os.close(file)


def refuse_if_written(run: Path) -> None:
    """Errors: RunDirectoryError when another process writes there."""
    path = run / FILE
    if not path.is_file() or _writer(path)[1] == str(os.getpid()):
        return
    with contextlib.suppress(PermissionError):  # not ours to ask
        file = os.open(path, os.O_RDWR)
        try:
            if not _try(file):
                raise _held(run)
        finally:
            os.close(file)


def _locked(path: Path) -> int | None:
    """The open file with its lock, None when another process has it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _try(file):
                os.close(file)
                return None
            if os.fstat(file).st_ino == path.stat().st_ino:
                return file
        except FileNotFoundError:
            pass
        os.close(file)  # the one who had it has just removed the file


def _try(file: int) -> bool:
    """Whether nobody else has it; true as well where there are no locks."""
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


def _writer(path: Path) -> tuple[str, str]:
    """(who, number of the process) as the file says."""
    try:
        who, _, number = path.read_text(encoding="utf-8").strip().rpartition(" ")
    except (OSError, UnicodeDecodeError):
        return "", ""
    return who, number


def _held(run: Path) -> RunDirectoryError:
    who, number = _writer(run / FILE)
    return RunDirectoryError(
        f"{who or 'a process'} (pid {number or 'unknown'}) is writing in {run}",
        "Wait until it has finished, or stop it with Ctrl-C where it runs.",
    )
