"""`edgetune run`: answer a prompt with an exported file and stream the answer to standard output."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgetune import console
from edgetune.errors import ConfigError

if TYPE_CHECKING:
    from edgetune.runtime import Answer, Runtime

CONSTANTS = {"true": "true", "false": "false", "none": "null", "null": "null", "yes": "true", "no": "false"}
"""Spellings of constants in lower case -> JSON. A template would take another spelling for a text, which is true."""


@click.command(name="run")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", required=True, help="Prompt; - reads it from standard input.")
@click.option("--raw", is_flag=True, help="Continue the text of the prompt, without the chat template.")
@click.option("--system", help="System message before the prompt.")
@click.option(
    "--template-option",
    "template_options",
    multiple=True,
    metavar="NAME=VALUE",
    help="Variable of the chat template, as JSON, such as enable_thinking=false (repeatable).",
)
@click.option(
    "--thinking",
    type=click.Choice(["hide", "show"]),
    default="hide",
    show_default=True,
    help="Whether reasoning before the answer is written, too. An empty thought never is.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Sampling temperature; 0 = greedy.",
)
@click.option(
    "--top-k", type=click.IntRange(min=0), default=40, show_default=True, help="Keep the K most likely tokens; 0 = all."
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.95,
    show_default=True,
    help="Nucleus sampling: cumulative probability to keep.",
)
@click.option(
    "--min-p",
    type=click.FloatRange(0, 1),
    default=0.05,
    show_default=True,
    help="Minimum probability relative to the most likely token.",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 2), help="Seed of the sampler.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Maximum number of tokens to generate.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="CPU threads. Default: the physical cores (1 for a tiny model)."
)
@click.option(
    "--context",
    type=click.IntRange(min=8),
    help="Context size in tokens, for prompt and answer. Default: at most 4096.",
)
@click.option("-v", "--verbose", is_flag=True, help="Print the speed, also when not on a terminal.")
def command(
    file: Path,
    prompt: str,
    raw: bool,
    system: str | None,
    template_options: tuple[str, ...],
    thinking: str,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int | None,
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
    from edgetune.runtime import Sampling, load

    for option, given in (("--system", system is not None), ("--template-option", bool(template_options))):
        if raw and given:
            raise ConfigError(
                f"{option} cannot be used with --raw, which applies no chat template", "Remove one of them"
            )
    variables = dict(map(parse_template_option, template_options))
    text = read_standard_input() if prompt == "-" else prompt
    sampling = Sampling(temperature, top_k, top_p, min_p, seed)
    with load(file, threads=threads, context=context) as runtime:
        if raw:
            answer = runtime.complete(text, sampling=sampling, max_tokens=max_tokens)
        else:
            before = [] if system is None else [{"role": "system", "content": system}]
            messages = [*before, {"role": "user", "content": text}]
            answer = runtime.chat(messages, sampling=sampling, max_tokens=max_tokens, template_options=variables)
        if runtime.context > runtime.trained_context:
            console.warn(
                f"the context is {runtime.context} tokens, but the model was trained for {runtime.trained_context}"
            )
        try:
            write(answer, show_thinking=thinking == "show")
        except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
            with Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())
            return
        report(answer, runtime, verbose or sys.stderr.isatty(), thinking_hidden=thinking == "hide")


def parse_template_option(text: str) -> tuple[str, Any]:
    """Return name and value of `NAME=VALUE`. A value that is not JSON is a text: reasoning_effort=low."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise ConfigError(
            f"--template-option {text!r} is not of the form NAME=VALUE", "For instance enable_thinking=false"
        )
    try:
        return name, json.loads(value)
    except ValueError:
        if value.lower() in CONSTANTS:
            raise ConfigError(
                f"--template-option {text!r}: {value} is not JSON", f"Write {name}={CONSTANTS[value.lower()]}"
            ) from None
        return name, value


def read_standard_input() -> str:
    """Return all of standard input, without a newline at its end."""
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError:
        raise ConfigError("standard input is not UTF-8 text", "Convert it, for instance with iconv") from None


def write(answer: Answer, *, show_thinking: bool = False) -> None:
    """Write an answer to standard output as it is generated, with a newline at its end unless it is empty."""
    started = was_thought = False
    try:
        for text, is_thought in answer.parts():
            if is_thought and not (show_thinking and (was_thought or text.strip())):
                continue
            if was_thought and not is_thought:
                emit("\n\n")
            started, was_thought = True, is_thought
            emit(text)
    finally:  # also after Ctrl-C
        if started:
            emit("\n")


def emit(text: str) -> None:
    """Write UTF-8 whatever the locale is: an answer must not fail because of a character set."""
    sys.stdout.buffer.write(text.encode("utf-8", "replace"))
    sys.stdout.buffer.flush()


def report(answer: Answer, runtime: Runtime, with_speed: bool, *, thinking_hidden: bool = False) -> None:
    """Warn about an answer that is cut off or has only reasoning; print the speed on request."""
    from edgetune.runtime import Finish

    if thinking_hidden and answer.thought.strip() and not answer.text().strip():
        console.warn(
            f"all {len(answer.tokens)} tokens are reasoning, which is not shown; raise --max-tokens, or show it with "
            "--thinking show"
        )
    if answer.finish is Finish.CONTEXT:
        console.warn(f"the answer was cut off: the context of {runtime.context} tokens is full (see --context)")
    if with_speed:
        timing = answer.timing
        rate = f", {timing.decode_rate:.1f} tokens/s" if timing.tokens > 1 else ""
        threads = f"{runtime.threads} thread{'s' if runtime.threads > 1 else ''}"
        console.note(
            f"prompt {timing.prompt_tokens} tokens, {timing.prompt_rate:.0f} tokens/s; "
            f"answer {timing.tokens} tokens{rate} ({threads})"
        )
