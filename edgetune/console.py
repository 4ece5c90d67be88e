"""Terminal output: progress and messages on standard error, results on standard output."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

Progress = Callable[[int, int], None]
"""Called with (done, total) while work is in progress."""
LINE_SECONDS = 30.0
"""Between two lines of progress on a pipe."""


@cache
def stderr() -> Console:
    """Return the console for progress, notes and errors. Work goes on where nobody reads them any more."""
    from rich.console import Console

    class StandardError(Console):
        def on_broken_pipe(self) -> None:
            """Write to nowhere from now on, in place of ending the program."""
            with Path(os.devnull).open("wb") as nowhere, suppress(OSError, ValueError):
                os.dup2(nowhere.fileno(), sys.stderr.fileno())

    return StandardError(stderr=True, highlight=False)


@cache
def stdout() -> Console:
    """Return the console for results. On a pipe it is 100 characters wide unless COLUMNS sets another width."""
    from rich.console import Console

    wide = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if wide else 100)


def note(message: str) -> None:
    """Print one line about the progress of the work."""
    from rich.markup import escape

    stderr().print(escape(message), soft_wrap=True)


def warn(message: str) -> None:
    """Print one line about something the user may want to change."""
    from rich.markup import escape

    stderr().print(f"[yellow]warning:[/] {escape(message)}", soft_wrap=True)


@contextmanager
def notices() -> Iterator[None]:
    """Print each RuntimeNotice, which is otherwise ignored, as one warning line."""
    from edgetune.errors import RuntimeNotice

    with warnings.catch_warnings():
        show_others = warnings.showwarning

        def show(
            message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
            line: str | None = None,
        ) -> None:  # fmt: skip
            if issubclass(category, RuntimeNotice):
                warn(str(message))
            else:
                show_others(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        warnings.simplefilter("always", RuntimeNotice)
        yield


def fail(message: str, hint: str | None = None) -> None:
    """Print an error as one sentence, and the hint as another.

    Args:
        message: What is wrong, with the value.
        hint: What to do about it, without a period at the end.
    """
    from rich.markup import escape

    stderr().print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    if hint:
        stderr().print(f"       {escape(end_sentence(hint))}", soft_wrap=True)


def end_sentence(hint: str) -> str:
    """Return the hint with a period, except after a command in backticks, which a period would spoil for copying."""
    return hint if hint.endswith((".", "?", "!", "`")) else hint + "."


def print_columns(rows: Sequence[Sequence[Text]], widths: Sequence[int | None]) -> None:
    """Print rows of left-aligned cells to standard output.

    On a terminal long cells are folded into their column. On a pipe they stay on one line, so that paths can be read
    and searched by other programs.

    Args:
        rows: Cells, as many in each row as there are widths.
        widths: Smallest width of each column in characters; None: the width of its longest cell.
    """
    if stdout().is_terminal:
        _print_grid(rows, widths)
        return
    sizes = [width or max((len(row[place]) for row in rows), default=0) for place, width in enumerate(widths)]
    for row in rows:
        line = "  ".join(cell.plain.ljust(size) for cell, size in zip(row, sizes, strict=True))
        stdout().print(line.rstrip(), soft_wrap=True, markup=False, emoji=False)


def print_table(table: Table) -> None:
    """Print a table to standard output. On a pipe its cells stay whole, however wide it becomes."""
    from rich.console import Console

    (stdout() if stdout().is_terminal else Console(highlight=False, width=10_000)).print(table)


def _print_grid(rows: Sequence[Sequence[Text]], widths: Sequence[int | None]) -> None:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2, 0, 0))
    for place, width in enumerate(widths):
        grid.add_column(width=width, overflow="fold", no_wrap=place + 1 < len(widths))
    for row in rows:
        grid.add_row(*row)
    stdout().print(grid)


@contextmanager
def byte_progress(description: str) -> Iterator[Progress]:
    """Show a bar with bytes, bytes per second and time left. On a pipe show nothing, and load no library."""
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
def count_progress(description: str, *, announce: bool = False) -> Iterator[Progress]:
    """Show a bar with a count and time left.

    On a pipe show nothing; with `announce` a line with the description, and then one at most every half minute.
    """
    if announce and not stderr().is_terminal:
        note(description)
        yield _line_progress(description)
        return
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
    )  # fmt: skip
    with _bar(description, columns) as update:
        yield update


def _line_progress(description: str, clock: Callable[[], float] = time.monotonic) -> Progress:
    """Return a function that prints the count and the time left, half a minute after the last line or later."""
    begun = printed = clock()
    first: int | None = None  # what an interrupted process had done already does not count for the speed

    def update(done: int, total: int) -> None:
        nonlocal printed, first
        now = clock()
        first = done if first is None else first
        if done >= total or now - printed < LINE_SECONDS:
            return
        printed = now
        left = (now - begun) * (total - done) / (done - first) if done > first else None
        note(f"{description}: {done} of {total}" + ("" if left is None else f", about {_duration(left)} left"))

    return update


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


@contextmanager
def _bar(description: str, columns: tuple[object, ...]) -> Iterator[Progress]:
    from rich.progress import Progress as Bar

    with Bar(*columns, console=stderr(), disable=not stderr().is_terminal) as bar:  # type: ignore[arg-type]
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
