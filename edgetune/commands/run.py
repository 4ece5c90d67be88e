"""`edgetune run`: answer a prompt with an exported file and stream the answer to standard output."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgetune.errors import ConfigError
from edgetune.generation.options import machine_options, parse_template_option, sampling_options, template_option

if TYPE_CHECKING:
    from edgetune.runtime import Sampling


@click.command(name="run")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", required=True, help="Prompt; - reads it from standard input.")
@click.option("--raw", is_flag=True, help="Continue the text of the prompt, without the chat template.")
@click.option("--system", help="System message before the prompt.")
@template_option
@click.option(
    "--thinking",
    type=click.Choice(["hide", "show"]),
    default="hide",
    show_default=True,
    help="Whether reasoning before the answer is written, too. An empty thought never is.",
)
@sampling_options
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Maximum number of tokens to generate.",
)
@machine_options
@click.option("-v", "--verbose", is_flag=True, help="Print the speed, also when not on a terminal.")
def command(
    file: Path,
    prompt: str,
    raw: bool,
    system: str | None,
    template_options: tuple[str, ...],
    thinking: str,
    sampling: Sampling,
    max_tokens: int,
    threads: int | None,
    context: int | None,
    verbose: bool,
) -> None:
    """Answer a prompt with FILE, on the CPU. Only the answer is written to standard output.

    \b
    Examples:
      edgetune run model.gguf -p "dim the bedroom lights"
      cat letter.txt | edgetune run model.gguf -p - --system "Summarize." --temperature 0.7
    """
    from edgetune.generation import printing
    from edgetune.runtime import load

    for option, given in (("--system", system is not None), ("--template-option", bool(template_options))):
        if raw and given:
            raise ConfigError(
                f"{option} cannot be used with --raw, which applies no chat template", "Remove one of them"
            )
    variables = dict(map(parse_template_option, template_options))
    text = printing.read_standard_input() if prompt == "-" else prompt
    with load(file, threads=threads, context=context) as runtime:
        if raw:
            answer = runtime.complete(text, sampling=sampling, max_tokens=max_tokens)
        else:
            before = [] if system is None else [{"role": "system", "content": system}]
            messages = [*before, {"role": "user", "content": text}]
            answer = runtime.chat(messages, sampling=sampling, max_tokens=max_tokens, template_options=variables)
        printing.warn_of_context(runtime)
        try:
            printing.write_answer(answer, show_thinking=thinking == "show")
        except BrokenPipeError:
            printing.discard_output()
            return
        printing.report_answer(answer, runtime, verbose or sys.stderr.isatty(), thinking_hidden=thinking == "hide")
