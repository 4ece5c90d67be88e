"""Terminal output: hints are sentences, and nothing is wrapped on a pipe."""

from __future__ import annotations

import pytest
from rich.text import Text

from edgetune import console


@pytest.mark.parametrize(
    ("hint", "printed"),
    [
        ("Free some space", "Free some space."),
        ("Free some space.", "Free some space."),
        ("Did you mean x?", "Did you mean x?"),
        ("Run `pip install 'edgetune[train]'`", "Run `pip install 'edgetune[train]'`"),
    ],
)
def test_a_hint_gets_its_period_in_one_place(capsys: pytest.CaptureFixture[str], hint: str, printed: str) -> None:
    console.stderr.cache_clear()
    console.fail("no space [is] left", hint)
    console.stderr.cache_clear()
    assert capsys.readouterr().err.splitlines() == ["error: no space [is] left", "       " + printed]


def test_columns_are_not_wrapped_on_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    console.stdout.cache_clear()
    path = "/a/very/long/path" * 20
    console.print_columns([[Text("ok"), Text("disk"), Text(path)], [Text(), Text(), Text("[hint] :x:")]], (4, 12, None))
    console.stdout.cache_clear()
    assert capsys.readouterr().out.splitlines() == [f"ok    disk          {path}", " " * 20 + "[hint] :x:"]


def test_columns_are_as_wide_as_their_longest_cell(capsys: pytest.CaptureFixture[str]) -> None:
    console.stdout.cache_clear()
    console.print_columns([[Text("a"), Text("1")], [Text("long"), Text("22")]], (None, None))
    console.print_columns([], (None, None))
    console.stdout.cache_clear()
    assert capsys.readouterr().out.splitlines() == ["a     1", "long  22"]


def test_on_a_pipe_progress_is_a_line_every_half_minute_with_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = iter([0.0, 10.0, 29.9, 30.0, 59.0, 90.0, 100.0])
    update = console._line_progress("answers", clock=lambda: next(seconds))
    for done in (40, 50, 60, 61, 90, 100):
        update(done, 100)
    assert capsys.readouterr().err.splitlines() == [
        "answers: 60 of 100, about 60 s left",
        "answers: 90 of 100, about 18 s left",
    ]
