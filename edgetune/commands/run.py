"""`edgetune run`: answer a prompt with an exported file and stream the answer to standard output."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgetune.errors import ConfigError
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
    from collections.abc import Mapping, Sequence

    from edgetune.generation.adapters import WeightedAdapter
    from edgetune.generation.answering import RowsTask
    from edgetune.runtime import Sampling
    from edgetune.runtime.slots import Speculation


@click.command(name="run", cls=OneFileCommand, hint="Give a prompt with -p, such as -p {text}")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", help="Prompt; - reads it from standard input, as does a pipe without -p.")
@click.option(
    "--input",
    "rows",
    type=click.Path(path_type=Path),
    help="Answer each row of a file in place of one prompt: messages, instructions, prompts or lines of text; - reads "
    "JSON lines from standard input.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="JSONL file of the rows with their answers. A stopped command continues it. Default: standard output.",
)
@click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
@click.option("--skip-bad-rows", is_flag=True, help="Leave out rows that cannot be answered.")
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
@adapter_option
@machine_options
@speculation_options
@click.option("-v", "--verbose", is_flag=True, help="Print the speed, also when not on a terminal.")
@click.pass_context
def command(
    ctx: click.Context,
    file: Path,
    prompt: str | None,
    rows: Path | None,
    output: Path | None,
    overwrite: bool,
    skip_bad_rows: bool,
    raw: bool,
    system: str | None,
    template_options: tuple[str, ...],
    thinking: str,
    sampling: Sampling,
    max_tokens: int,
    adapters: Sequence[WeightedAdapter],
    threads: int | None,
    context: int | None,
    no_fit: bool,
    speculation: Speculation,
    verbose: bool,
) -> None:
    """Answer a prompt, or each row of a file, with FILE, on the CPU. Only answers are written to standard output.

    \b
    Examples:
      edgetune run model.gguf -p "dim the bedroom lights"
      cat letter.txt | edgetune run model.gguf --system "Summarize." --temperature 0.7
      edgetune run model.gguf --input rows.jsonl --output answers.jsonl
    """
    from edgetune import console
    from edgetune.generation import guessing, printing
    from edgetune.runtime.engine import Engine

    if prompt is None and rows is None and not sys.stdin.isatty():
        prompt = printing.read_standard_input() or None
    for_rows = {"--output": output, "--overwrite": overwrite, "--skip-bad-rows": skip_bad_rows}
    _check_together(prompt, rows, speculation.draft, for_rows)
    _check_raw(raw, {"--system": system is not None, "--template-option": bool(template_options)})
    variables = dict(map(parse_template_option, template_options))
    if rows is not None:
        from edgetune.generation.answering import RowsTask

        task = RowsTask(
            rows, output, sampling, max_tokens, raw=raw, system=system, options=variables,
            skip_bad_rows=skip_bad_rows, overwrite=overwrite, adapters=tuple(adapters),
        )  # fmt: skip
        ctx.exit(_answer_rows(file, task, threads, context, no_fit=no_fit))
    assert prompt is not None
    text = printing.read_standard_input() if prompt == "-" else prompt
    before = [] if system is None else [{"role": "system", "content": system}]
    messages = None if raw else [*before, {"role": "user", "content": text}]
    guesses = guessing.can_guess(file, speculation, sampling)
    with (
        printing.load_fitted(file, threads, context, no_fit=no_fit, adapters=adapters) as runtime,
        Engine(runtime, slots=1, speculation=speculation) if guesses else nullcontext() as engine,
    ):
        answer, ticket = guessing.begin_answer(
            runtime, engine, text, messages, variables, sampling, max_tokens, [each.in_use for each in adapters]
        )
        printing.warn_of_context(runtime)
        try:
            printing.write_answer(answer, show_thinking=thinking == "show")
        except BrokenPipeError:
            printing.discard_output()
            return
        with_speed = verbose or sys.stderr.isatty()
        printing.report_answer(answer, runtime, with_speed, thinking_hidden=thinking == "hide")
        if ticket is not None and with_speed:
            console.note(guessing.describe_guesses(ticket))


def _check_raw(raw: bool, given: Mapping[str, bool]) -> None:
    option = next((option for option, is_given in given.items() if is_given), None)
    if raw and option is not None:
        raise ConfigError(f"{option} cannot be used with --raw, which applies no chat template", "Remove one of them")


def _check_together(
    prompt: str | None, rows: Path | None, draft: Path | None, for_rows: Mapping[str, object]
) -> None:  # fmt: skip
    if rows is not None and draft is not None:
        raise ConfigError("--draft is for --prompt", "Remove it: rows are answered together, without guesses")
    if prompt is None and rows is None:
        raise click.UsageError(
            "There is no prompt: give one with -p, on standard input, or a file of rows with --input."
        )
    if prompt is not None and rows is not None:
        raise ConfigError("--prompt and --input cannot be used together", "Remove one of them")
    given = next((option for option, value in for_rows.items() if value), None)
    if rows is None and given is not None:
        raise ConfigError(f"{given} is for the rows of --input", "Give a file with --input, or remove it")


def _answer_rows(file: Path, task: RowsTask, threads: int | None, context: int | None, *, no_fit: bool) -> int:
    """Answer the rows of a file; return the exit code."""
    from dataclasses import replace
    from tempfile import TemporaryDirectory

    from edgetune import console
    from edgetune.generation import printing
    from edgetune.generation.answering import StoppedEarly, answer_rows

    with (
        printing.load_fitted(file, threads, context, no_fit=no_fit, adapters=task.adapters) as runtime,
        TemporaryDirectory() as directory,
    ):
        printing.warn_of_context(runtime)
        if str(task.input) == "-":
            lines = Path(directory) / "rows.jsonl"
            lines.write_bytes(sys.stdin.buffer.read())
            task = replace(task, input=lines, name="standard input")
        try:
            count = answer_rows(runtime, task)
        except StoppedEarly:
            return 130
        except BrokenPipeError:
            printing.discard_output()
            return 0
    if task.output is not None:
        console.note(f"{task.output}: {count} answers")
    return 0
