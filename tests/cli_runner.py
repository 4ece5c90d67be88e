"""The command line as tests call it: in this process, or, where a process is the point, in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO
from unittest import mock

from edgetune import cli, console

COMMAND = [sys.executable, "-m", "edgetune.cli"]
Result = subprocess.CompletedProcess[bytes]


def edgetune(*arguments: str | Path, stdin: bytes = b"", **environment: str) -> Result:
    """Run the command line in this process.

    The bytes of file descriptors 1 and 2 are captured, which C libraries write to as well. An exception that the
    command line would show as a traceback is raised here.
    """
    command = [*map(str, arguments)]
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
        files[0].write(stdin)
        files[0].seek(0)
        stack.enter_context(mock.patch.dict(os.environ, environment))
        stack.enter_context(plain_warnings())
        with redirected(files):
            code = cli.run(command)
        return Result(command, code, *(content(file) for file in files[1:]))


def edgetune_process(*arguments: str | Path, stdin: bytes = b"", **environment: str) -> Result:
    """Run the command line in a process of its own: for signals, pipes, and what it imports."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        timeout=300,
        env={**os.environ, **environment},
    )


def sentence(result: Result) -> str:
    """Return the error message, after checking that it is no traceback and that standard output is empty."""
    said = result.stderr.decode()
    assert "Traceback" not in said
    assert "error:" in said or "Usage:" in said
    assert result.stdout == b""
    return said


def content(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


@contextmanager
def redirected(files: Sequence[IO[bytes]]) -> Iterator[None]:
    """Redirect the standard streams, by descriptor and by name, to three files."""
    names = ("stdin", "stdout", "stderr")
    before = [getattr(sys, name) for name in names]
    for stream in before[1:]:
        stream.flush()
    saved = [os.dup(number) for number in range(3)]
    try:
        for number, file in enumerate(files):
            os.dup2(file.fileno(), number)
        sys.stdin = os.fdopen(0, "r", encoding="utf-8", closefd=False)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
        forget_consoles()
        yield
    finally:
        for name, stream in zip(names, before, strict=True):
            getattr(sys, name).close()
            setattr(sys, name, stream)
        for number, copy in enumerate(saved):
            os.dup2(copy, number)
            os.close(copy)
        forget_consoles()


def forget_consoles() -> None:
    """A console keeps the width and the kind of the stream that it was made for."""
    console.stderr.cache_clear()
    console.stdout.cache_clear()


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show warnings as an ordinary process does, not as pytest does, which turns them into errors."""

    def show(message: Warning | str, category: type[Warning], *_: object) -> None:
        sys.stderr.write(f"{category.__name__}: {message}\n")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield
