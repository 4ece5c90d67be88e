"""The ladder: base, trained model, and each exported file on the same held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.console import Progress
from edgetune.errors import RunDirectoryError
from edgetune.reference import Reference, Rows
from edgetune.run_directory import RunDirectory
from edgetune.runtime import Runtime, load
from edgetune.validation import contract, metrics, scoring, task
from edgetune.validation.metrics import Figures
from edgetune_converters.adapters import Adapter
from edgetune_converters.receipts import combined_hash

ProgressBar = Callable[[str], AbstractContextManager[Progress]]

_TEMPLATE = 256  # tokens that a chat template may add to a conversation
_LONGEST_PROMPT = 16384
_BASE_HASH = "edgetune.base.sha256"
UNQUANTIZED = {0: "f32", 1: "f16", 32: "bf16"}  # general.file_type


@dataclass(frozen=True)
class Rung:
    """One model of the ladder; `file` and `contract` only for exported files."""

    name: str
    figures: Figures
    task: task.TaskScore | None
    file: Path | None = None
    size: int | None = None
    contract: contract.Contract | None = None
    is_quantized: bool = False
    notes: tuple[str, ...] = ()
    mismatches: tuple[str, ...] = ()
    """What the file says it was made from and this run is not; one fails the gate whatever the figures are."""


@dataclass(frozen=True)
class Ladder:
    """Everything that was measured."""

    run: RunDirectory
    reference: Reference
    rows: Rows
    rungs: list[Rung]
    """base, trained, then the files in the order given."""

    @property
    def base(self) -> Rung:
        """The model before training."""
        return self.rungs[0]

    @property
    def trained(self) -> Rung:
        """The model as it was trained: what the others are compared with."""
        return self.rungs[1]

    @property
    def files(self) -> list[Rung]:
        """The exported files."""
        return self.rungs[2:]


@dataclass(frozen=True)
class Options:
    """How much to measure."""

    rows: int | None = None
    """Only the first so many held-out rows."""
    with_task: bool = True
    threads: int | None = None


def climb(run: RunDirectory, files: list[Path], options: Options, bar: ProgressBar) -> Ladder:
    """Measure every file. Raises one-sentence errors before the first minute of work where that is possible."""
    reference = Reference.open(run.reference)
    rows = reference.rows if options.rows is None else reference.rows.first(options.rows)
    count = len(rows.positions)
    if not count:
        raise RunDirectoryError(f"the first {len(rows)} rows have no scored token", "Ask for more with --rows.")
    stored = {"base": metrics.of_base(reference, count), "trained": metrics.of_trained(reference, count)}
    rungs = [
        Rung(name, metrics.figures(scored, reference), _stored_task(reference, name, options))
        for name, scored in stored.items()
    ]
    ladder = Ladder(run, reference, rows, rungs)
    for file in files:
        rungs.append(measure(ladder, file, options, bar))
    return ladder


def _stored_task(reference: Reference, which: str, options: Options) -> task.TaskScore | None:
    return task.stored_score(reference.task, which) if reference.task and options.with_task else None


def measure(ladder: Ladder, file: Path, options: Options, bar: ProgressBar) -> Rung:
    """One exported file on the ladder's rows."""
    reference, run = ladder.reference, ladder.run
    longest = int(max(len(ids) for ids, _, _ in ladder.rows))
    max_tokens = int(run.manifest["config"]["reference"]["max_new_tokens"])
    with load(file, threads=options.threads, context=_context(reference, longest, max_tokens)) as runtime:
        _check_fits(runtime, longest)
        scoring.check_vocabulary(runtime, reference)
        held = contract.check(runtime, reference.contract, run.tokenizer)
        with bar(f"{file.name}: score") as progress:
            scored = scoring.score(runtime, reference, ladder.rows, progress)
        answers = None
        if reference.task and options.with_task:
            with bar(f"{file.name}: task") as progress:
                answers = task.run_task(runtime, reference.task, max_tokens, progress)
        return Rung(
            file.name, metrics.figures(scored, reference), answers, file, file.stat().st_size, held,
            runtime.metadata.get("general.file_type") not in UNQUANTIZED,
            tuple(_unsigned(runtime.metadata)), tuple(_mismatches(runtime.metadata, run)),
        )  # fmt: skip


def _context(reference: Reference, longest: int, max_tokens: int) -> int:
    """Room for the longest row, and for the task's prompts with their answers.

    How many tokens these prompts have is known only once the file is open, with its context: a token is a byte or more.
    """
    prompts = [
        sum(len(str(turn).encode()) for turn in row["messages"]) for row in (reference.task or {"rows": []})["rows"]
    ]
    return max(longest, min(max(prompts, default=0) + _TEMPLATE, _LONGEST_PROMPT) + max_tokens)


def _check_fits(runtime: Runtime, longest: int) -> None:
    if longest > runtime.trained_context:
        raise RunDirectoryError(
            f"a held-out row has {longest} tokens, {runtime.path} was made for {runtime.trained_context}",
            "Train again with a smaller training.max_length.",
        )


def _unsigned(metadata: Mapping[str, Any]) -> list[str]:
    """A file that another tool made carries no hashes: it is measured, and its origin stays unknown."""
    return [] if _BASE_HASH in metadata else ["the file does not say what it was made from"]


def _mismatches(metadata: Mapping[str, Any], run: RunDirectory) -> list[str]:
    """Whether the file says that it was made from another base or adapter than this run's."""
    if _BASE_HASH not in metadata:
        return []
    found = []
    if metadata[_BASE_HASH] != combined_hash(run.manifest["base"]["files"]):
        found.append("the file was made from another base than this run")
    if run.adapter.is_dir() and metadata.get("edgetune.adapter.sha256") != combined_hash(
        Adapter(run.adapter).identity()
    ):
        found.append("the file was not made with this run's adapter; if you trained again, export again")
    return found
