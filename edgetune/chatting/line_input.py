"""Messages from a terminal, with line editing, history and completion."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from edgetune import console
from edgetune.chatting.message_lines import needs_more, to_message
from edgetune.chatting.slash_commands import COMMANDS, SETTINGS

if TYPE_CHECKING:
    from prompt_toolkit.input import Input
    from prompt_toolkit.output import Output

_PROMPT, _CONTINUATION = "> ", ". "
_FILE_COMMANDS = ("save", "load", "adapter")


class CommandCompleter(Completer):
    """Completes the names of commands and settings, and paths."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Yield what can stand at the cursor."""
        text = document.text_before_cursor
        if not text.startswith("/") or text.startswith("//") or "\n" in text:
            return
        name, space, argument = text[1:].partition(" ")
        if not space:
            found: Iterator[tuple[str, str]] = ((each, command.summary) for each, command in COMMANDS.items())
        elif name == "set" and " " not in argument:
            name, found = argument, ((each, setting.help) for each, setting in SETTINGS.items())
        else:
            if name in _FILE_COMMANDS:
                yield from self._paths.get_completions(Document(argument), complete_event)
            return
        for each, meaning in found:
            if each.startswith(name):
                yield Completion(each, -len(name), display_meta=meaning)


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if needs_more(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


class TerminalInput:
    """Reads messages with prompt_toolkit."""

    def __init__(
        self, *, keeps_history: bool = True, given_input: Input | None = None, given_output: Output | None = None
    ) -> None:
        """Prepare the editor.

        Args:
            keeps_history: Whether messages are kept in the user's history file.
            given_input: The terminal that is read; None for that of the process.
            given_output: The terminal that is written; None for that of the process.
        """
        self._session: PromptSession[str] = PromptSession(
            history=open_history() if keeps_history else InMemoryHistory(),
            completer=CommandCompleter(),
            key_bindings=_key_bindings(),
            multiline=True,
            prompt_continuation=_CONTINUATION,
            complete_while_typing=False,
            input=given_input,
            output=given_output,
        )

    def messages(self) -> Iterator[str]:
        """Yield messages and commands until Ctrl-D. Ctrl-C clears what was typed."""
        while True:
            try:
                text = self._session.prompt(_PROMPT)
            except KeyboardInterrupt:
                console.note("Ctrl-D leaves; /help lists the commands")
                continue
            except EOFError:
                return
            if message := to_message(text):
                yield message


def history_path() -> Path:
    """Return the file of the history, in the user's directory for state (XDG_STATE_HOME)."""
    base = os.environ.get("XDG_STATE_HOME")
    state = Path(base) if base and Path(base).is_absolute() else Path.home() / ".local/state"
    return state / "edgetune/chat_history"


def open_history() -> History:
    """Return the history of the user, readable by nobody else; one in memory if it cannot be written."""
    try:
        path = history_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        console.warn(f"the history of messages is not kept: {reason}")
        return InMemoryHistory()
    return FileHistory(str(path))
