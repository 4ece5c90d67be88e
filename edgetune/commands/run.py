"""`edgetune run`: answer a prompt with an exported file and stream the answer to standard output."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgetune.errors import ConfigError
from edgetune.generation.options import machine_options, parse_template_option, sampling_options, template_option

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgetune.generation.answering import RowsTask
    from edgetune.runtime import Sampling


@click.command(name="run")
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
@machine_options
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
    threads: int | None,
    context: int | None,
    verbose: bool,
) -> None:
    """Answer a prompt, or each row of a file, with FILE, on the CPU. Only answers are written to standard output.

    \b
    Examples:
      edgetune run model.gguf -p "dim the bedroom lights"
      cat letter.txt | edgetune run model.gguf --system "Summarize." --temperature 0.7
      edgetune run model.gguf --input rows.jsonl --output answers.jsonl
    """
    from edgetune.generation import printing
    from edgetune.runtime import load

    if prompt is None and rows is None and not sys.stdin.isatty():
        prompt = printing.read_standard_input() or None
    _check_together(prompt, rows, {"--output": output, "--overwrite": overwrite, "--skip-bad-rows": skip_bad_rows})

    for option, given in (("--system", system is not None), ("--template-option", bool(template_options))):
        if raw and given:
            raise ConfigError(
                f"{option} cannot be used with --raw, which applies no chat template", "Remove one of them"
            )
    variables = dict(map(parse_template_option, template_options))
    if rows is not None:
        from edgetune.generation.answering import RowsTask

        task = RowsTask(
            rows, output, sampling, max_tokens, raw=raw, system=system, options=variables,
            skip_bad_rows=skip_bad_rows, overwrite=overwrite,
        )  # fmt: skip
        ctx.exit(_answer_rows(file, task, threads, context))
    assert prompt is not None
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


def _check_together(prompt: str | None, rows: Path | None, for_rows: Mapping[str, object]) -> None:
    if prompt is None and rows is None:
        raise click.UsageError(
            "There is no prompt: give one with -p, on standard input, or a file of rows with --input."
        )
    if prompt is not None and rows is not None:
        raise ConfigError("--prompt and --input cannot be used together", "Remove one of them")
    given = next((option for option, value in for_rows.items() if value), None)
    if rows is None and given is not None:
        raise ConfigError(f"{given} is for the rows of --input", "Give a file with --input, or remove it")


def _answer_rows(file: Path, task: RowsTask, threads: int | None, context: int | None) -> int:
    """Answer the rows of a file; return the exit code."""
    from dataclasses import replace
    from tempfile import TemporaryDirectory

    from edgetune import console
    from edgetune.generation import printing
    from edgetune.generation.answering import StoppedEarly, answer_rows
    from edgetune.runtime import load

    with load(file, threads=threads, context=context) as runtime, TemporaryDirectory() as directory:
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
