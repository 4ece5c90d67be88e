"""`edgetune chat`: a conversation with an exported file in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgetune.generation.adapters import adapter_option
from edgetune.generation.options import (
    OneFileCommand,
    machine_options,
    parse_template_option,
    sampling_options,
    speculation_options,
    template_option,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from edgetune.chatting.session import ChatSession
    from edgetune.generation.adapters import WeightedAdapter
    from edgetune.runtime import Sampling
    from edgetune.runtime.slots import Speculation


@click.command(
    name="chat", cls=OneFileCommand, hint="Write messages in the chat, or answer one: edgetune run FILE -p {text}"
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--system", help="System message.")
@click.option(
    "--load", "conversation", type=click.Path(path_type=Path), help="Continue the conversation in a file (/save)."
)
@template_option
@click.option(
    "--thinking",
    type=click.Choice(["hide", "show"]),
    help="Whether reasoning before the answer is written, too. Default: show on a terminal, dimmed; else hide.",
)
@sampling_options
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    help="Maximum number of tokens of an answer. Default: until it ends or the context is full.",
)
@adapter_option
@machine_options
@speculation_options
@click.option("--no-history", is_flag=True, help="Do not keep the messages for the line editor of later chats.")
@click.option("-v", "--verbose", is_flag=True, help="Print the speed, also when not on a terminal.")
@click.pass_context
def command(
    ctx: click.Context,
    file: Path,
    system: str | None,
    conversation: Path | None,
    template_options: tuple[str, ...],
    thinking: str | None,
    sampling: Sampling,
    max_tokens: int | None,
    adapters: Sequence[WeightedAdapter],
    threads: int | None,
    context: int | None,
    no_fit: bool,
    speculation: Speculation,
    no_history: bool,
    verbose: bool,
) -> None:
    """Chat with FILE, on the CPU. /help lists the commands of the chat.

    Without a terminal, each line of standard input is a message, and only the answers are written to standard output;
    the exit code is 1 if a message or a command failed.

    \b
    Examples:
      edgetune chat model.gguf --system "Be brief." --temperature 0.7
      printf 'dim the lights\\nand now brighter\\n' | edgetune chat model.gguf
    """
    from edgetune import console
    from edgetune.chatting.loop import run_chat
    from edgetune.chatting.screen import Screen, is_terminal
    from edgetune.chatting.session import ChatSession
    from edgetune.generation import guessing, printing
    from edgetune.runtime.engine import Engine

    variables = dict(map(parse_template_option, template_options))
    on_terminal = is_terminal()
    show = thinking == "show" if thinking else on_terminal
    guessing.can_guess(file, speculation, sampling)  # which warns of a draft model that has nothing to do
    with (
        printing.load_fitted(file, threads, context, no_fit=no_fit) as runtime,
        Engine(runtime, slots=1, speculation=speculation) as engine,
    ):
        printing.warn_of_context(runtime)
        session = ChatSession(engine, sampling, max_tokens, variables, show, system)
        for adapter in adapters:
            session.use_adapter(str(adapter.path), adapter.weight)
        for key in session.load(conversation) if conversation else ():
            console.warn(f"{conversation}: {key} is not read")
        if system is not None:
            session.system = system  # also in place of that of a loaded conversation
        try:
            screen = Screen(is_terminal=on_terminal, verbose=verbose)
            succeeded = run_chat(session, _messages(session, on_terminal, no_history), screen)
        except BrokenPipeError:
            printing.discard_output()
            return
    if not succeeded and not on_terminal:
        ctx.exit(1)


def _messages(session: ChatSession, on_terminal: bool, no_history: bool) -> Iterator[str]:
    from edgetune import console

    if not on_terminal:
        from edgetune.chatting.message_lines import PipeInput

        return PipeInput().messages()
    from edgetune.chatting.line_input import TerminalInput

    runtime = session.runtime
    console.note(f"{runtime.path.name}: a context of {runtime.context} tokens. /help lists the commands, Ctrl-D leaves")
    return TerminalInput(keeps_history=not no_history).messages()
