"""What a chat writes: reasoning dimmed on a terminal, no control characters, how an answer ended."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from edgetune.chatting.screen import Screen, describe_usage
from edgetune.data.answer_frame import AnswerFrame
from edgetune.runtime import Answer, Finish, Generation
from edgetune.runtime.engine import Usage
from tests.cli_runner import forget_consoles

FRAME = AnswerFrame(opening="<think>", closing="</think>")


def answer(text: str, finish: Finish | type[KeyboardInterrupt] = Finish.STOP) -> Answer:
    """An answer whose tokens are bytes."""

    def events() -> Iterator[tuple[int, int | Finish]]:
        for byte in text.encode():
            yield 0, byte
        if not isinstance(finish, Finish):
            raise finish
        yield 0, finish

    def token_bytes(token: int, *, special: bool = False) -> bytes:
        return bytes([token])

    return Answer([1], Generation(events()), token_bytes, FRAME)


def written(text: str, capfdbinary: pytest.CaptureFixture[bytes], *, terminal: bool, show: bool = True) -> str:
    Screen(is_terminal=terminal).write_answer(answer(text), show_thinking=show)
    return capfdbinary.readouterr().out.decode()


@pytest.fixture(autouse=True)
def colors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def test_reasoning_is_dimmed_on_a_terminal(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert written("<think>hm</think>yes", capfdbinary, terminal=True) == "\x1b[2mhm\x1b[0m\n\nyes\n"


def test_reasoning_is_not_dimmed_without_colors(
    capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert written("<think>hm</think>yes", capfdbinary, terminal=False) == "hm\n\nyes\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert written("<think>hm</think>yes", capfdbinary, terminal=True) == "hm\n\nyes\n"


def test_hidden_reasoning_is_not_written(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert written("<think>hm</think>yes", capfdbinary, terminal=True, show=False) == "yes\n"


def test_an_answer_cannot_control_the_terminal(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    text = "a\x1b[2Jb\x9b\x07\tc\n灯👍🏽"
    assert written(text, capfdbinary, terminal=True) == "a␛[2Jb\ufffd␇\tc\n灯👍🏽\n"
    assert written(text, capfdbinary, terminal=False) == text + "\n"


def test_a_stopped_answer_is_returned_as_far_as_it_came(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    found = Screen(is_terminal=True).write_answer(answer("<think>hm</think>yes", KeyboardInterrupt), show_thinking=True)
    assert found == ("yes", "hm", True)
    assert capfdbinary.readouterr().out.endswith(b"yes\n")
    found = Screen(is_terminal=True).write_answer(answer("<think>hm", KeyboardInterrupt), show_thinking=True)
    assert found == ("", "hm", True)
    assert capfdbinary.readouterr().out.decode() == "\x1b[2mhm\x1b[0m\n"


@pytest.mark.parametrize(
    ("text", "finish", "said"),
    [
        ("yes", Finish.CONTEXT, "the context of 64 tokens is full. Remove messages with /undo or /reset"),
        ("yes", Finish.LENGTH, "/set max_tokens"),
        ("", Finish.STOP, "the answer is empty"),
        ("<think>hm</think>", Finish.STOP, "/set thinking show"),
        ("yes", KeyboardInterrupt, "stopped; the answer is kept"),
        ("", KeyboardInterrupt, "stopped"),
    ],
)
def test_how_an_answer_ended_is_said(
    text: str, finish: Finish | type[KeyboardInterrupt], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    forget_consoles()
    screen = Screen(is_terminal=False)
    found = answer(text, finish)
    result = screen.write_answer(found, show_thinking=False)
    runtime = SimpleNamespace(context=64, threads=1)
    session: Any = SimpleNamespace(runtime=runtime, show_thinking=False, usage=Usage(1))
    screen.report(found.finish, result, session)
    assert said in capfd.readouterr().err.replace("\n", " ")
    forget_consoles()


def test_the_speed_of_a_prompt_counts_what_was_evaluated() -> None:
    usage = Usage(30, 20, 5, 0.0, 0.5, 0.4)
    assert describe_usage(usage, 2) == (
        "prompt 20 tokens in the cache and 10 tokens, 20 tokens/s; answer 5 tokens, 10.0 tokens/s (2 threads)"
    )
