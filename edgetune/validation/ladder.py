"""The ladder: base, trained and merged model, and each exported file on the same held-out rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgetune.console import Progress
from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.errors import RunDirectoryError
from edgetune.reference import merged
from edgetune.reference.codecs import F64
from edgetune.reference.scored_rows import ScoredRows
from edgetune.reference.store import Reference
from edgetune.runs.directory import RunDirectory
from edgetune.runtime import Runtime, load
from edgetune.validation import contract, greedy, metrics, provenance, scoring, task
from edgetune.validation.detail import detail
from edgetune.validation.metrics import TokenScores
from edgetune.validation.rungs import BASE, MERGED, TRAINED, Ladder, LongRow, Rung
from edgetune.validation.tensor_costs import TensorCosts

__all__ = ["Ladder", "Options", "Rung", "climb"]

ProgressBar = Callable[[str], AbstractContextManager[Progress]]
Locate = Callable[[Reference, Path, Progress], TensorCosts]

_TEMPLATE = 256  # tokens that a chat template may add to a conversation
_LONGEST_PROMPT = 16384


@dataclass(frozen=True)
class Options:
    """How much to measure."""

    rows: int | None = None
    """Only the first so many held-out rows."""
    with_task: bool = True
    threads: int | None = None
    locate: Locate | None = None
    """Measures what the quantization of each tensor of a GGUF file costs; None: not measured."""


def climb(run: RunDirectory, files: list[Path], options: Options, bar: ProgressBar) -> Ladder:
    """Measure every file. Raises one-sentence errors before the first minute of work where that is possible."""
    reference = Reference.open(run.reference)
    rows = reference.main_rows if options.rows is None else reference.main_rows.first(options.rows)
    if not len(rows.positions):
        raise RunDirectoryError(f"the first {len(rows)} rows have no scored token", "Ask for more with --rows.")
    ladder = Ladder(run, reference, rows, list(_stored(reference, rows, options)))
    for file in files:
        ladder.rungs.append(_located(ladder, measure(ladder, file, options, bar), options, bar))
    return ladder


def _located(ladder: Ladder, rung: Rung, options: Options, bar: ProgressBar) -> Rung:
    """With the tensors that cost most, if that was asked for and there is something to swap."""
    if options.locate is None or not rung.is_quantized or rung.is_onnx or rung.file is None:
        return rung
    with bar(f"{rung.name}: locate") as progress:
        located = options.locate(ladder.reference, rung.file, progress)
    return replace(rung, located=located)


def _stored(reference: Reference, rows: ScoredRows, options: Options) -> list[Rung]:
    """The rungs that were captured: nothing is computed for them."""
    count = len(rows.positions)
    scored = {BASE: metrics.of_base(reference, count), TRAINED: metrics.of_trained(reference, count)}
    found = [
        Rung(which, metrics.figures(each, reference), _stored_task(reference, which, options), which,
             row_kld=_row_means(rows, each.kld))
        for which, each in scored.items()
    ]  # fmt: skip
    for name in merged.MERGED:
        compared = merged.read(reference, name)
        if compared is None:
            continue
        each = TokenScores(compared.kld, compared.top, compared.nll)
        figures = metrics.figures(each.first(count), reference)
        found.append(
            Rung(f"merged {name}", figures, None, MERGED, merge_base=name, row_kld=_row_means(rows, each.kld),
                 long_rows=_long(reference, each) if options.rows is None else ())
        )  # fmt: skip
    return found


def _stored_task(reference: Reference, which: str, options: Options) -> task.TaskScore | None:
    return task.stored_score(reference.task, which) if reference.task and options.with_task else None


def measure(ladder: Ladder, file: Path, options: Options, bar: ProgressBar) -> Rung:
    """One exported file on the ladder's rows, and on the long ones if nothing is left out."""
    reference = ladder.reference
    rows = reference.rows if options.rows is None else ladder.rows
    longest = int(max(len(ids) for ids, _, _ in rows))
    max_tokens = int(ladder.run.manifest.config["reference"]["max_new_tokens"])
    with load(file, threads=options.threads, context=_context(reference, longest, max_tokens), clip=True) as runtime:
        runtime.verify()
        _check_fits(runtime, longest)
        scoring.check_vocabulary(runtime, reference)
        held = contract.check(runtime, reference.contract, ladder.run.tokenizer)
        with bar(f"{file.name}: score") as progress:
            scored = scoring.score(runtime, reference, rows, progress)
        rung = _rung(ladder, runtime, scored.first(len(ladder.rows.positions)))
        rung = _with_answers(rung, ladder, runtime, held, max_tokens if options.with_task else 0, bar)
        return replace(rung, long_rows=_long(reference, scored) if options.rows is None else ())


def _rung(ladder: Ladder, runtime: Runtime, scored: TokenScores) -> Rung:
    file, metadata = runtime.path, runtime.metadata
    return Rung(
        name=file.name,
        figures=metrics.figures(scored, ladder.reference),
        task=None,
        file=file,
        size=runtime.size,
        is_quantized=runtime.is_quantized,
        notes=tuple(provenance.unsigned(metadata)),
        mismatches=tuple(provenance.mismatches(metadata, ladder.run)),
        detail=detail(runtime, ladder.reference, ladder.rows, scored),
        merge_base=provenance.merge_base(metadata),
        is_onnx=runtime.format == "onnx",
        row_kld=_row_means(ladder.rows, scored.kld),
    )


def _with_answers(
    rung: Rung, ladder: Ladder, runtime: Runtime, held: contract.Contract, max_tokens: int, bar: ProgressBar
) -> Rung:
    """The contract, and what the file says greedily; `max_tokens` 0 leaves the test rows out."""
    reference, answers = ladder.reference, None
    with bar(f"{rung.name}: greedy") as progress:
        agreement, fault = greedy.compare_answers(runtime, reference.greedy, _stops(ladder.run), progress)
    if reference.task and max_tokens:
        with bar(f"{rung.name}: task") as progress:
            answers = task.run_task(runtime, reference.task, max_tokens, progress)
    return replace(rung, contract=held.with_fault("stop", fault), agreement=agreement, task=answers)


def _stops(run: RunDirectory) -> frozenset[int]:
    """The stop tokens of training."""
    if not (run.tokenizer / "tokenizer.json").is_file():
        return frozenset()
    return TextTokenizer.from_directory(run.tokenizer).stop_ids


def _row_means(rows: ScoredRows, kld: F64) -> tuple[float, ...]:
    return tuple(float(kld[where].mean()) if where.stop > where.start else float("nan") for _, _, where in rows)


def _long(reference: Reference, scored: TokenScores) -> tuple[LongRow, ...]:
    """The last rows of the reference one by one."""
    same = scored.top == reference.trained_top
    long_rows = list(reference.rows)[len(reference.rows) - reference.long_rows :]
    return tuple(
        LongRow(len(ids), float(np.mean(scored.kld[where])), float(np.mean(same[where]))) for ids, _, where in long_rows
    )


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
