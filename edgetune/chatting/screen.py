"""What a chat shows: answers on standard output as they are generated, notes on standard error."""

from __future__ import annotations

import os
import sys
from typing import NamedTuple

from edgetune import console
from edgetune.chatting.session import ChatSession
from edgetune.generation.printing import describe_speed, emit
from edgetune.runtime import Answer, Finish, Timing
from edgetune.runtime.engine import Usage

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
_UNSAFE = {**_PICTURES, 0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}
"""Control characters, with which a text could change the terminal -> the characters that are shown for them."""


class Written(NamedTuple):
    """What has been generated of an answer."""

    text: str
    thought: str
    is_stopped: bool
    """Whether Ctrl-C stopped it."""


class Screen:
    """Writes to a terminal, with colors and speed, or to pipes, to which only answers are written."""

    def __init__(self, *, is_terminal: bool, verbose: bool = False) -> None:
        self._is_terminal = is_terminal
        self._has_colors = is_terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self._has_speed = is_terminal or verbose

    def write_answer(self, answer: Answer, *, show_thinking: bool) -> Written:
        """Write an answer while it is generated, until it ends or Ctrl-C stops it."""
        text: list[str] = []
        thought: list[str] = []
        shown = was_thought = is_stopped = False
        try:
            for piece, is_thought in answer.parts():
                (thought if is_thought else text).append(piece)
                if is_thought and not (show_thinking and (was_thought or piece.strip())):
                    continue
                if is_thought != was_thought:
                    self._change_style(is_thought)
                shown, was_thought = True, is_thought
                self._write(piece)
        except KeyboardInterrupt:
            is_stopped = True
        finally:
            if was_thought and self._has_colors:
                emit(_PLAIN)
            if shown:
                emit("\n")
        return Written("".join(text), "".join(thought), is_stopped)

    def _change_style(self, is_thought: bool) -> None:
        style = (_DIM if is_thought else _PLAIN) if self._has_colors else ""
        emit(style if is_thought else f"{style}\n\n")

    def _write(self, text: str) -> None:
        emit(text.translate(_UNSAFE) if self._is_terminal else text)

    def write_text(self, text: str) -> None:
        """Write the reply of a command: to standard output on a terminal, else to standard error."""
        if self._is_terminal:
            self._write(text + "\n")
        else:
            console.note(text)

    def report(self, finish: Finish | None, written: Written, session: ChatSession) -> None:
        """Say how an answer ended, if not by itself, and how fast it was."""
        context = session.runtime.context
        if written.is_stopped:
            console.note("stopped; the answer is kept as far as it was written" if written.text else "stopped")
        elif finish is Finish.CONTEXT:
            console.warn(
                f"the answer was cut off: the context of {context} tokens is full. Remove messages with /undo or "
                "/reset, or start with a larger --context"
            )
        elif finish is Finish.LENGTH:
            console.note("the answer was cut off at max_tokens; /set max_tokens changes it")
        elif not written.text and written.thought.strip() and not session.show_thinking:
            console.warn("the answer has only reasoning; /set thinking show shows it")
        elif not written.text:
            console.note("the answer is empty")
        if self._has_speed and session.usage.generated_tokens:
            used = session.usage.prompt_tokens + session.usage.generated_tokens
            text = (
                f"{describe_usage(session.usage, session.runtime.threads)}; {used} of {context} tokens of the context"
            )
            console.stderr().print(text, style="dim", markup=False, soft_wrap=True)


def describe_usage(usage: Usage, threads: int) -> str:
    """Return tokens and rates of prompt and answer; the rate of the prompt counts what was not in the cache."""
    new = usage.prompt_tokens - usage.cached_tokens
    timing = Timing(new, usage.generated_tokens, usage.prompt_seconds, usage.decode_seconds)
    rates = describe_speed(timing, threads)
    if not usage.cached_tokens:
        return rates
    return f"prompt {usage.cached_tokens} tokens in the cache and" + rates.removeprefix("prompt")


def is_terminal() -> bool:
    """Whether a person types and reads."""
    return sys.stdin.isatty() and sys.stdout.isatty()
