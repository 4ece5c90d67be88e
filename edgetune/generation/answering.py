"""Answer the prompts of a file in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgetune import console
from edgetune.data.answer_frame import NO_FRAME, AnswerReader
from edgetune.data.problems import RowProblems
from edgetune.errors import DataError
from edgetune.generation.adapters import WeightedAdapter
from edgetune.generation.answer_file import AnswerFile
from edgetune.generation.printing import emit
from edgetune.generation.prompt_rows import GENERATED, PromptRow, RowPrompts, format_row, raise_problems
from edgetune.runtime import Completion, Finish, Runtime, Sampling
from edgetune.runtime.text import to_pieces
from edgetune_converters.files.contents import sha256_of

_SHOWN_ROWS = 20


@dataclass(frozen=True)
class RowsTask:
    """What is answered, and how.

    Attributes:
        input: File of rows.
        output: File of answers; None writes them to standard output.
        sampling: How tokens are chosen.
        max_tokens: Maximum number of tokens of an answer.
        raw: Whether prompts are plain text, without the chat template.
        system: System message of rows that have none.
        options: Template options.
        skip_bad_rows: Whether rows that cannot be answered are left out.
        overwrite: Whether a finished output is replaced.
        adapters: Adapters that the runtime uses.
        name: What messages call the input; its path by default.
    """

    input: Path
    output: Path | None
    sampling: Sampling
    max_tokens: int
    raw: bool = False
    system: str | None = None
    options: Mapping[str, Any] | None = None
    skip_bad_rows: bool = False
    overwrite: bool = False
    adapters: tuple[WeightedAdapter, ...] = ()
    name: str | None = None


class StoppedEarly(Exception):
    """Ctrl-C stopped the answers; the output is continued by the same command."""


def answer_rows(runtime: Runtime, task: RowsTask) -> int:
    """Answer all rows of a file, and return how many answers were written.

    All rows are read before the first is answered. A stopped output is continued by the same call.

    Raises:
        DataError: Rows cannot be answered; names each.
        ConfigError: The output exists or was begun with other settings.
        StoppedEarly: Ctrl-C was pressed after the output was opened.
    """
    settings = {
        "input": sha256_of(task.input) if task.input.is_file() else None, "model": _identity(runtime.path),
        "sampling": {name: value for name, value in asdict(task.sampling).items() if value != _DEFAULTS[name]},
        "max_tokens": task.max_tokens, "context": runtime.context, "raw": task.raw, "system": task.system,
        "template_options": dict(task.options or {}), "skip_bad_rows": task.skip_bad_rows,
    }  # fmt: skip
    if task.adapters:
        settings["adapters"] = [[_identity(adapter.path), adapter.weight] for adapter in task.adapters]
    rows = _read_rows(runtime, task)
    output = AnswerFile(task.output, settings, overwrite=task.overwrite) if task.output else None
    with output or nullcontext():
        done = output.done if output else 0
        if done:
            console.note(f"{task.output}: {min(done, len(rows))} of {len(rows)} rows are answered already")
        write = output.write if output else emit
        _write_answers(runtime, rows, done, task, write, can_continue=output is not None)
        if output:
            output.finish()
    return len(rows)


_DEFAULTS = asdict(Sampling())


def _identity(model: Path) -> list[Any]:
    """Return what changes with a model file without reading it: path, size and time of each of its files."""
    files = sorted(model.iterdir()) if model.is_dir() else [model]
    return [str(model.absolute()), [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]]


def _read_rows(runtime: Runtime, task: RowsTask) -> list[PromptRow]:
    problems = RowProblems(skip=task.skip_bad_rows)
    reader = RowPrompts(
        runtime, max_tokens=task.max_tokens, raw=task.raw, system=task.system, options=task.options
    )  # fmt: skip
    rows = list(reader.read_file(task.input, problems, task.name))
    raise_problems(problems)
    if not rows:
        raise DataError(
            f"{task.name or task.input} holds no rows that can be answered", "Give a file with at least one row"
        )
    if problems.count:
        console.warn(f"{problems.count} of {problems.count + len(rows)} rows are left out:")
        for line in problems.rows[:_SHOWN_ROWS]:
            console.note(f"  {line}")
        if problems.count > _SHOWN_ROWS:
            console.note(f"  ... and {problems.count - _SHOWN_ROWS} more")
    if reader.own_system:
        count = reader.own_system
        console.note(f"{count} row{'s have' if count > 1 else ' has'} a system message of its own, which is used")
    return rows


def _write_answers(
    runtime: Runtime, rows: Sequence[PromptRow], done: int, task: RowsTask, write: Callable[[str], None], *,
    can_continue: bool,
) -> None:  # fmt: skip
    rest = rows[done:]
    prompts = [row.ids.tolist() for row in rest]
    try:
        with console.count_progress(f"answering {len(rows)} rows", announce=True) as update:
            update(done, len(rows))
            found = runtime.generate_batch(prompts, task.sampling, [task.max_tokens] * len(prompts))
            for row, completion in zip(rest, found, strict=True):
                write(format_row(_answered(runtime, row, completion)))
                done += 1
                update(done, len(rows))
    except KeyboardInterrupt:
        if not can_continue:
            raise
        console.note(f"stopped after {done} of {len(rows)} rows; the same command continues")
        raise StoppedEarly from None


def _answered(runtime: Runtime, row: PromptRow, completion: Completion) -> dict[str, Any]:
    """Return a row with the answer to its prompt."""
    frame = NO_FRAME
    if row.messages is not None:
        frame = runtime.answer_frame(row.messages, tools=row.tools, template_options=row.options)
    text, thought = "", ""
    for part, is_thought in _parts(AnswerReader(frame), runtime, completion):
        if is_thought:
            thought += part
        else:
            text += part
    answer: dict[str, Any] = {GENERATED: text}
    if thought.strip():
        answer[f"{GENERATED}_thought"] = thought
    return {**row.source, **answer, f"{GENERATED}_finish": str(completion.finish)}


def _parts(reader: AnswerReader, runtime: Runtime, completion: Completion) -> Iterator[tuple[str, bool]]:
    for piece in to_pieces(completion.tokens, runtime.token_bytes):
        yield from reader.feed(piece)
    yield from reader.finish(is_cut=completion.finish is not Finish.STOP)
