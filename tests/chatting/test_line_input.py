"""Line editing, several lines, history and completion, with prompt_toolkit's own input and output."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from edgetune.chatting import line_input
from edgetune.chatting.line_input import CommandCompleter, TerminalInput
from edgetune.chatting.message_lines import PipeInput
from edgetune.errors import DataError

ENTER, ALT_ENTER, CTRL_C, CTRL_D, UP, TAB = "\r", "\x1b\r", "\x03", "\x04", "\x1b[A", "\t"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


def typed(keys: str, *, keeps_history: bool = True) -> list[str]:
    with create_pipe_input() as pipe:
        pipe.send_text(keys + CTRL_D)
        given = TerminalInput(keeps_history=keeps_history, given_input=pipe, given_output=DummyOutput())
        return list(given.messages())


def typed_in_turn(first: str, is_ready: Callable[[Buffer], bool], second: str) -> list[str]:
    """Type the second keys when the editor has done in the background what it is waited for."""
    with create_pipe_input() as pipe:
        given = TerminalInput(given_input=pipe, given_output=DummyOutput())

        def press() -> None:
            for _ in range(1000):
                if is_ready(given._session.default_buffer):
                    break
                time.sleep(0.01)
            pipe.send_text(second + CTRL_D)

        pipe.send_text(first)
        thread = threading.Thread(target=press)
        thread.start()
        messages = list(given.messages())
        thread.join()
        return messages


def test_enter_sends_and_control_d_leaves() -> None:
    assert typed(f"one{ENTER}two{ENTER}") == ["one", "two"]


def test_blank_messages_are_not_sent() -> None:
    assert typed(f"{ENTER}   {ENTER}one{ENTER}") == ["one"]


@pytest.mark.parametrize(
    "keys",
    [f"a{ALT_ENTER}b{ENTER}", f"a\\{ENTER}b{ENTER}", f'"""a{ENTER}b"""{ENTER}', "\x1b[200~a\nb\x1b[201~" + ENTER],
    ids=["alt-enter", "backslash", "quotes", "pasted"],
)
def test_a_message_can_have_several_lines(keys: str) -> None:
    assert typed(keys) == ["a\nb"]


def test_control_c_clears_the_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert typed(f"unfinished{CTRL_C}one{ENTER}") == ["one"]
    assert "Ctrl-D leaves" in capfd.readouterr().err


def test_messages_are_edited_and_repeated_from_the_history(state: Path) -> None:
    assert typed(f"one{ENTER}") == ["one"]
    assert typed_in_turn("", lambda buffer: len(buffer._working_lines) > 1, f"{UP}!{ENTER}") == ["one!"]
    path = state / "edgetune/chat_history"
    assert path.stat().st_mode & 0o777 == 0o600
    assert typed(f"secret{ENTER}", keeps_history=False) == ["secret"]
    assert "secret" not in path.read_text(encoding="utf-8")


def test_a_history_that_cannot_be_written_is_said(state: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (state / "edgetune").write_text("a file")
    assert typed(f"one{ENTER}") == ["one"]
    assert "the history of messages is not kept" in capfd.readouterr().err.replace("\n", " ")


def test_tab_completes_a_command() -> None:
    assert typed_in_turn(f"/un{TAB}", lambda buffer: buffer.text == "/undo", ENTER) == ["/undo"]


def completions(text: str) -> list[str]:
    return [each.text for each in CommandCompleter().get_completions(Document(text), CompleteEvent())]


def test_commands_settings_and_files_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert completions("/re") == ["regen", "reset"]
    assert completions("/set tem") == ["temperature", "template"]
    assert completions("re") == completions("//re") == completions("/set seed 1") == completions("/system ab") == []
    (tmp_path / "chat.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert completions("/load ch") == ["at.json"]


def piped(data: bytes) -> Iterator[str]:
    return PipeInput(io.BytesIO(data)).messages()


def test_each_line_of_a_pipe_is_a_message() -> None:
    assert list(piped("one\r\n\n把灯\nthree".encode())) == ["one", "把灯", "three"]
    assert list(piped(b'a\\\nb\n"""c\nd"""\n"""open\nend')) == ["a\nb", "c\nd", '"""open\nend']


def test_a_line_that_is_not_utf_8_is_named() -> None:
    lines = piped(b"one\n\xff\n")
    assert next(lines) == "one"
    with pytest.raises(DataError, match="line 2 of standard input is not UTF-8"):
        next(lines)


def test_the_history_is_in_the_state_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert line_input.history_path() == Path.home() / ".local/state/edgetune/chat_history"
