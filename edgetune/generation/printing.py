"""Write an answer to standard output while it is generated, and report what became of it on standard error."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from edgetune import console
from edgetune.errors import ConfigError
from edgetune.generation.adapters import WeightedAdapter
from edgetune.runtime import Answer, Finish, Runtime, Timing
from edgetune.runtime.loading import load_text_model
from edgetune.runtime.machine_fit import find_fit


def read_standard_input() -> str:
    """Return all of standard input, without a newline at its end."""
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError:
        raise ConfigError("standard input is not UTF-8 text", "Convert it, for instance with iconv") from None


def write_answer(answer: Answer, *, show_thinking: bool = False) -> None:
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


def discard_output() -> None:
    """Let nothing fail that is still written to standard output after its reader, such as `head`, has closed it."""
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def load_fitted(
    file: Path, threads: int | None, context: int | None, *, no_fit: bool, adapters: Sequence[WeightedAdapter] = ()
) -> Runtime:
    """Open a file, with adapters in use and the settings that `edgetune fit` remembered for it, and say so."""
    fit = None if no_fit else find_fit(file)
    runtime = load_text_model(file, threads=threads, context=context, fit=fit)
    try:
        for adapter in adapters:
            runtime.load_adapter(adapter.path, adapter.in_use[0])
        runtime.use_adapters([adapter.in_use for adapter in adapters])
    except BaseException:
        runtime.close()
        raise
    if fit is not None and sys.stderr.isatty():
        console.note(
            f"{file.name}: {fit.describe()}, as fitted on {time.strftime('%Y-%m-%d', time.localtime(fit.measured))}"
        )
    return runtime


def warn_of_context(runtime: Runtime) -> None:
    """Warn if the context is longer than that of the training."""
    if runtime.context > runtime.trained_context:
        console.warn(
            f"the context is {runtime.context} tokens, but the model was trained for {runtime.trained_context}"
        )


def report_answer(answer: Answer, runtime: Runtime, with_speed: bool, *, thinking_hidden: bool = False) -> None:
    """Warn about an answer that is cut off or has only reasoning; print the speed on request."""
    if thinking_hidden and answer.thought.strip() and not answer.text().strip():
        console.warn(
            f"all {len(answer.tokens)} tokens are reasoning, which is not shown; raise --max-tokens, or show it with "
            "--thinking show"
        )
    if answer.finish is Finish.CONTEXT:
        console.warn(f"the answer was cut off: the context of {runtime.context} tokens is full (see --context)")
    if with_speed:
        console.note(describe_speed(answer.timing, runtime.threads))


def describe_speed(timing: Timing, threads: int) -> str:
    """Return tokens and rates of prompt and answer."""
    rate = f", {timing.decode_rate:.1f} tokens/s" if timing.tokens > 1 else ""
    return (
        f"prompt {_count(timing.prompt_tokens, 'token')}, {timing.prompt_rate:.0f} tokens/s; "
        f"answer {_count(timing.tokens, 'token')}{rate} ({_count(threads, 'thread')})"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
