"""`edgetune run`: a prompt in, the answer of an exported file out, as it is generated."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgetune import console
from edgetune.errors import ConfigError

if TYPE_CHECKING:
    from edgetune.runtime import Generation, Runtime, Sampling


@click.command(name="run")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", required=True, help="Prompt; - reads it from standard input.")
@click.option("--raw", is_flag=True, help="Continue the text of the prompt, without the chat template.")
@click.option("--system", help="System message before the prompt.")
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

    if raw and system is not None:
        raise ConfigError("--system has no place in a --raw prompt", "Leave one of the two out.")
    text = read_standard_input() if prompt == "-" else prompt
    sampling = Sampling(temperature, top_k, top_p, min_p, seed)
    with load(file, threads=threads, context=context) as runtime:
        ids = runtime.tokenize(text if raw else as_conversation(runtime, text, system))
        warn_beyond_training(runtime)
        try:
            timing = answer(runtime, ids, sampling, max_tokens)
        except BrokenPipeError:  # the reader, such as `head`, has seen enough
            with Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())
            return
    if verbose or sys.stderr.isatty():
        console.note(str(timing))


@dataclass(frozen=True)
class Timing:
    """How long an answer took."""

    prompt_tokens: int
    tokens: int
    first: float
    """Seconds until the first token."""
    rest: float
    """Seconds for the others."""
    threads: int

    def __str__(self) -> str:
        """One line: `prompt 12 tokens, 150 tokens/s; answer 48 tokens, 21.0 tokens/s (4 threads)`."""
        prompt = self.prompt_tokens / max(self.first, 1e-9)
        speed = f", {(self.tokens - 1) / max(self.rest, 1e-9):.1f} tokens/s" if self.tokens > 1 else ""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return (
            f"prompt {self.prompt_tokens} tokens, {prompt:.0f} tokens/s; answer {self.tokens} tokens{speed} ({threads})"
        )


def read_standard_input() -> str:
    """The prompt from a pipe: all of it, without the newline that ends it."""
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError:
        raise ConfigError("standard input is not UTF-8 text", "Convert it, for instance with iconv.") from None


def as_conversation(runtime: Runtime, text: str, system: str | None) -> str:
    """The prompt as the file's chat template renders it, up to where the answer begins."""
    if runtime.chat_template is None:
        raise ConfigError(
            f"{runtime.path} has no chat template",
            "Add --raw to continue the text as it is, or export with a template.",
        )
    messages = [{"role": "system", "content": system}] if system is not None else []
    return runtime.chat_template.render([*messages, {"role": "user", "content": text}], add_generation_prompt=True)


def warn_beyond_training(runtime: Runtime) -> None:
    """A longer context than the model was made for is allowed, and rarely wise."""
    if runtime.context > runtime.trained_context:
        console.warn(f"the context is {runtime.context} tokens; the model was made for {runtime.trained_context}")


def answer(runtime: Runtime, ids: list[int], sampling: Sampling, max_tokens: int) -> Timing:
    """Write the answer to standard output as it comes; a warning when the context ended it."""
    from edgetune.runtime import Finish

    started = time.perf_counter()
    generation = runtime.generate(ids, sampling, max_tokens)
    count, first = stream(runtime, generation)
    ended = time.perf_counter()
    if generation.finish is Finish.CONTEXT:
        console.warn(f"the context of {runtime.context} tokens is full and the answer was cut; see --context")
    return Timing(len(ids), count, (first or ended) - started, ended - (first or ended), runtime.threads)


def stream(runtime: Runtime, generation: Generation) -> tuple[int, float | None]:
    """Write and flush each complete character; returns the number of tokens and when the first one was there."""
    from edgetune.runtime.text import Utf8Stream

    text = Utf8Stream()
    count, first = 0, None
    try:
        for token in generation:
            first = first or time.perf_counter()
            count += 1
            emit(text.feed(runtime.token_bytes(token)))
    except KeyboardInterrupt:
        emit("\n")
        raise
    emit(text.finish() + "\n")
    return count, first


def emit(text: str) -> None:
    """UTF-8 whatever the locale says: a model's answer must not fail for want of a character set."""
    if text:
        sys.stdout.buffer.write(text.encode("utf-8", "replace"))
        sys.stdout.buffer.flush()
