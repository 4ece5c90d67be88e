"""The loop of a chat: read a message or a command, answer it, until the input ends."""

from __future__ import annotations

from collections.abc import Iterable

from edgetune import console
from edgetune.chatting.screen import Screen
from edgetune.chatting.session import ChatSession
from edgetune.chatting.slash_commands import EndChat, run_command
from edgetune.errors import EdgetuneError
from edgetune.runtime import Answer

_NOT_FITTING = "Remove messages with /undo or /reset, or start with a larger --context"


def run_chat(session: ChatSession, messages: Iterable[str], screen: Screen) -> bool:
    """Answer messages and run commands until the input ends; return whether none of them failed.

    An error is shown and the chat goes on. Ctrl-C stops an answer and keeps the chat.
    """
    succeeded = True
    for line in messages:
        try:
            is_command = line.startswith("/") and not line.startswith("//")
            reply = run_command(session, line) if is_command else session.ask(line.removeprefix("/"))
            if isinstance(reply, Answer):
                _write(session, reply, screen)
            elif reply is not None:
                screen.write_text(reply)
        except EndChat:
            break
        except KeyboardInterrupt:
            console.note("stopped")
        except EdgetuneError as error:
            succeeded = False
            does_not_fit = "but the context is" in error.message
            console.fail(error.message, _NOT_FITTING if does_not_fit else error.hint)
        except BrokenPipeError:
            raise
        except OSError as error:
            succeeded = False
            where = f"{error.filename}: " if error.filename else ""
            console.fail(where + (error.strerror or str(error)).lower())
    return succeeded


def _write(session: ChatSession, answer: Answer, screen: Screen) -> None:
    try:
        written = screen.write_answer(answer, show_thinking=session.show_thinking)
    finally:  # also where the reader of a pipe has gone
        session.stop()
    if written.text or not written.is_stopped:
        session.keep(written.text, written.thought)
    screen.report(answer.finish, written, session)
