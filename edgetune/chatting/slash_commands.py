"""The commands of a chat: lines that begin with a slash."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click

from edgetune.chatting.session import ChatSession
from edgetune.errors import ConfigError
from edgetune.generation.options import EXCLUDED_BY_MIROSTAT, SAMPLING_OPTIONS, parse_template_option
from edgetune.runtime import Answer, Sampling

Reply = str | Answer | None
"""A text to show, an answer to write, or nothing."""


class EndChat(Exception):
    """The chat ends."""


class SlashCommand(NamedTuple):
    """A command: what follows its name, what it does, and a function of the session and the text behind the name."""

    argument: str
    summary: str
    run: Callable[[ChatSession, str], Reply]


def run_command(session: ChatSession, line: str) -> Reply:
    """Run the command in a line that begins with a slash.

    Raises:
        EdgetuneError: The command is unknown or cannot be done.
        EndChat: The command ends the chat.
    """
    name, _, argument = line[1:].partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"Did you mean /{close[0]}? " if close else ""
        raise ConfigError(
            f"there is no command /{name}",
            f"{hint}/help lists the commands; a message that begins with / is sent as //",
        )
    argument = argument.strip()
    if argument and not command.argument:
        raise ConfigError(f"/{name} takes no argument, and {argument!r} follows it", f"Write /{name} alone")
    return command.run(session, argument)


def _help(session: ChatSession, argument: str) -> str:
    lines = [f"/{name} {command.argument}".rstrip() for name, command in COMMANDS.items()]
    width = max(map(len, lines)) + 2
    listed = [line.ljust(width) + command.summary for line, command in zip(lines, COMMANDS.values(), strict=True)]
    return "\n".join([*listed, _KEYS])


_KEYS = """
Enter sends a message. Alt-Enter begins a new line, and so does Enter behind a backslash or within triple quotes.
Ctrl-C stops an answer and keeps the chat. Ctrl-D leaves. A message that begins with / is sent as //."""


def _system(session: ChatSession, argument: str) -> str:
    if not argument:
        return "no system message" if session.system is None else session.system
    if argument == '""':
        session.system = None
        return "the system message is removed"
    session.check_system(argument)
    session.system = argument
    return "the system message is set" + ("; it applies from the next answer on" if session.messages else "")


def _reset(session: ChatSession, argument: str) -> str:
    session.reset()
    return "the conversation is forgotten" + ("; the system message stays" if session.system else "")


def _undo(session: ChatSession, argument: str) -> str:
    removed = session.undo().splitlines() or [""]
    return f"removed: {removed[0][:60]}{'...' if len(removed) > 1 or len(removed[0]) > 60 else ''}"


def _regenerate(session: ChatSession, argument: str) -> Reply:
    return session.answer_again()


def _show(session: ChatSession, argument: str) -> str:
    system = [{"role": "system", "content": session.system}] if session.system is not None else []
    texts = [f"{message['role']}: {message['content']}" for message in [*system, *session.messages]]
    return "\n\n".join(texts) or "the conversation is empty"


def _path(argument: str, name: str) -> Path:
    if not argument:
        raise ConfigError(f"/{name} needs the name of a file", f"For instance /{name} chat.json")
    return Path(argument).expanduser()


def _save(session: ChatSession, argument: str) -> str:
    path = _path(argument, "save")
    session.save(path)
    return f"saved {len(session.messages)} messages to {path}"


def _load(session: ChatSession, argument: str) -> str:
    path = _path(argument, "load")
    unread = session.load(path)
    count = len(session.messages)
    text = f"loaded {count} message{'s' if count != 1 else ''} from {path}"
    if unread:
        text += f"; not read: {', '.join(unread)}"
    if session.messages and session.messages[-1]["role"] == "user":
        text += "; the last one has no answer: /regen writes it"
    return text


def _adapter(session: ChatSession, argument: str) -> str:
    if argument == "none":
        session.adapters = {}
    elif argument:
        session.use_adapter(*_split_weight(argument))
    loaded = session.runtime.adapters
    if not loaded:
        return "no adapter is loaded"
    width = max(map(len, loaded)) + 2
    return "\n".join(
        f"{name.ljust(width)}{f'weight {session.adapters[name]:g}' if name in session.adapters else 'not in use'}"
        for name in loaded
    )


def _split_weight(argument: str) -> tuple[str, float]:
    """Return the file or name, and the number behind it; 1 without one."""
    first, _, last = argument.rpartition(" ")
    try:
        weight = float(last)
    except ValueError:
        return argument, 1.0
    if not first or Path(argument).expanduser().exists():
        return argument, 1.0
    return first.strip(), weight


def _exit(session: ChatSession, argument: str) -> None:
    raise EndChat


class Setting(NamedTuple):
    """A setting of /set: its present value, a function that sets it, and what it means."""

    read: Callable[[ChatSession], Any]
    write: Callable[[ChatSession, str], None]
    help: str


def _convert(name: str, kind: click.ParamType[Any], text: str) -> Any:
    try:
        return kind.convert(text, None, None)
    except click.BadParameter as error:
        raise ConfigError(f"{name} cannot be {text!r}", error.message.rstrip(".")) from None


def _sampling_setting(name: str) -> Setting:
    option = SAMPLING_OPTIONS[name]

    def write(session: ChatSession, text: str) -> None:
        empty = option.default is None and text in ("none", "off")
        default = getattr(Sampling(), name)
        change: dict[str, Any] = {name: default if empty else _convert(name, option.type, text)}
        if name == "mirostat" and change[name]:
            change |= {each: getattr(Sampling(), each) for each in EXCLUDED_BY_MIROSTAT}
        sampling = replace(session.sampling, **change)
        sampling.check(session.runtime.vocabulary_size)
        session.sampling = sampling

    return Setting(lambda session: getattr(session.sampling, name), write, option.help)


def _set_max_tokens(session: ChatSession, text: str) -> None:
    session.max_tokens = None if text in ("none", "off") else _convert("max_tokens", click.IntRange(min=1), text)


def _set_thinking(session: ChatSession, text: str) -> None:
    session.show_thinking = _convert("thinking", click.Choice(["show", "hide"]), text) == "show"


def _set_template(session: ChatSession, text: str) -> None:
    name, value = parse_template_option(text)
    assert session.runtime.chat_template is not None
    session.runtime.chat_template.check_options({name: value})
    session.template_options = {**session.template_options, name: value}


SETTINGS: Mapping[str, Setting] = {
    **{name: _sampling_setting(name) for name in SAMPLING_OPTIONS},
    "max_tokens": Setting(
        lambda session: session.max_tokens, _set_max_tokens, "Maximum number of tokens of an answer; none = no limit."
    ),
    "thinking": Setting(
        lambda session: "show" if session.show_thinking else "hide", _set_thinking, "Whether reasoning is shown."
    ),
    "template": Setting(
        lambda session: session.template_options or None, _set_template, "NAME=VALUE: variable of the chat template."
    ),
}


def _set(session: ChatSession, argument: str) -> str:
    name, _, value = argument.partition(" ")
    name = name.replace("-", "_")
    if not name:
        width = max(map(len, SETTINGS)) + 2
        return "\n".join(
            f"{each.ljust(width)}{_spell(setting.read(session)).ljust(8)} {setting.help}"
            for each, setting in SETTINGS.items()
        )
    if name not in SETTINGS:
        close = difflib.get_close_matches(name, SETTINGS, 1)
        raise ConfigError(
            f"there is no setting {name}", f"Did you mean {close[0]}?" if close else "/set lists the settings"
        )
    setting, value = SETTINGS[name], value.strip()
    if value:
        setting.write(session, value)
    return f"{name} is {_spell(setting.read(session))}"


def _spell(value: Any) -> str:
    if value is None:
        return "none"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


COMMANDS: Mapping[str, SlashCommand] = {
    "help": SlashCommand("", "list the commands and keys", _help),
    "system": SlashCommand("[TEXT]", 'show or set the system message; "" removes it', _system),
    "set": SlashCommand("[NAME [VALUE]]", "show or change the sampling and other settings", _set),
    "adapter": SlashCommand(
        "[FILE [WEIGHT]]", "load a GGUF adapter, or weight a loaded one; none leaves all out", _adapter
    ),
    "regen": SlashCommand("", "answer the last message again", _regenerate),
    "undo": SlashCommand("", "remove the last message and its answer", _undo),
    "reset": SlashCommand("", "forget the conversation", _reset),
    "show": SlashCommand("", "show the conversation", _show),
    "save": SlashCommand("FILE", "write the conversation as a row of data", _save),
    "load": SlashCommand("FILE", "continue the conversation in a file", _load),
    "exit": SlashCommand("", "leave (also Ctrl-D)", _exit),
}
"""Name -> command, in the order of /help."""
