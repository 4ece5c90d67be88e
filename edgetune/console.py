"""The one place that talks to the terminal. Progress and messages go to standard error; results to standard output."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[int, int], None]
"""Called with (done, total) as work goes on."""


@cache
def stderr() -> Console:
    """For progress, notes and errors."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


@cache
def stdout() -> Console:
    """For results: what a user would pipe into a file; then 100 characters wide unless COLUMNS says otherwise."""
    from rich.console import Console

    wide = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if wide else 100)


def note(message: str) -> None:
    """One line about what is going on."""
    from rich.markup import escape

    stderr().print(escape(message), soft_wrap=True)


def warn(message: str) -> None:
    """One line about something the user may want to change."""
    from rich.markup import escape

    stderr().print(f"[yellow]warning:[/] {escape(message)}", soft_wrap=True)


def fail(message: str, hint: str | None = None) -> None:
    """The one sentence of an error, and what to do about it."""
    from rich.markup import escape

    stderr().print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    if hint:
        end = "" if hint.endswith((".", "?", "!", "`")) else "."
        stderr().print(f"       {escape(hint)}{end}", soft_wrap=True)


@contextmanager
def byte_progress(description: str) -> Iterator[Progress]:
    """A bar with bytes, bytes per second and time left; on a pipe, nothing, and for that no library is loaded."""
    if not (sys.stderr.isatty() or "FORCE_COLOR" in os.environ):
        yield lambda done, total: None
        return
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"), progress.BarColumn(), progress.DownloadColumn(),
        progress.TransferSpeedColumn(), progress.TimeRemainingColumn(),
    )  # fmt: skip
    with _bar(description, columns) as update:
        yield update


@contextmanager
def count_progress(description: str) -> Iterator[Progress]:
    """A bar with a count of so many and time left; on a pipe, nothing."""
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
    )  # fmt: skip
    with _bar(description, columns) as update:
        yield update


@contextmanager
def _bar(description: str, columns: tuple[object, ...]) -> Iterator[Progress]:
    from rich.progress import Progress as Bar

    with Bar(*columns, console=stderr(), disable=not stderr().is_terminal) as bar:  # type: ignore[arg-type]
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
