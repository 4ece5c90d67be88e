"""The ladder: the base, the trained and the merged models, and each exported file, on the same held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgetune.console import Progress
from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.errors import RunDirectoryError
from edgetune.reference import merged
from edgetune.reference.codecs import F64
from edgetune.reference.reward_scores import RewardScores
from edgetune.reference.scored_rows import ScoredRows
from edgetune.reference.store import Reference
from edgetune.runs.directory import RunDirectory
from edgetune.runtime import Runtime, load
from edgetune.runtime.hidden_mass import HiddenMass
from edgetune.validation import contract, greedy, metrics, provenance, scoring, task
from edgetune.validation.detail import measure_detail
from edgetune.validation.metrics import TokenScores
from edgetune.validation.results import BASE, FILE, MERGED, TRAINED, HiddenRows, LongRow, Rung
from edgetune.validation.scores import NO_HEAD, compare_scores, measure_scores

ProgressBar = Callable[[str], AbstractContextManager[Progress]]

_TEMPLATE = 256  # tokens that a chat template may add to a conversation
_LONGEST_PROMPT = 16384


@dataclass(frozen=True)
class Options:
    """How much to measure."""

    rows: int | None = None
    """Only the first so many held-out rows; the long rows are left out then."""
    with_task: bool = True
    threads: int | None = None


@dataclass(frozen=True)
class Ladder:
    """The measured models, with the run and the reference that they were measured against."""

    run: RunDirectory
    reference: Reference
    rows: ScoredRows
    scores: RewardScores | None
    """The scores of a reward model on held-out pairs."""
    rungs: list[Rung]
    """base, trained, the merged models that were captured, then the files in the order given."""

    @property
    def base(self) -> Rung:
        """The model before training."""
        return self.rungs[0]

    @property
    def trained(self) -> Rung:
        """The trained model, with which the others are compared."""
        return self.rungs[1]

    @property
    def files(self) -> list[Rung]:
        """The exported files."""
        return [rung for rung in self.rungs if rung.kind == FILE]


def measure_ladder(run: RunDirectory, files: Sequence[Path], options: Options, bar: ProgressBar) -> Ladder:
    """Measure the stored models and every file."""
    reference = Reference.open(run.reference)
    rows = reference.main_rows if options.rows is None else reference.main_rows.first(options.rows)
    if not len(rows.positions):
        raise RunDirectoryError(f"the first {len(rows)} rows have no scored token", "Ask for more with --rows")
    stored = RewardScores.of_run(run)
    scores = None if stored is None else stored.first(options.rows)
    captured = _captured_rungs(reference, rows, options)
    if scores is not None:
        captured[-1].scores = compare_scores(scores.scores, scores.scores)
    ladder = Ladder(run, reference, rows, scores, [*captured, *_merged_rungs(reference, rows, options)])
    for file in files:
        ladder.rungs.append(measure_file(ladder, file, options, bar))
    return ladder


def _captured_rungs(reference: Reference, rows: ScoredRows, options: Options) -> list[Rung]:
    """Return the base and the trained model, from their stored outputs."""
    count = len(rows.positions)
    found = []
    for name, scores in ((BASE, metrics.of_base(reference, count)), (TRAINED, metrics.of_trained(reference, count))):
        score = task.stored_score(reference.task, name) if reference.task and options.with_task else None
        found.append(
            Rung(
                name=name,
                kind=name,
                figures=metrics.figures(scores, reference),
                task=score,
                row_kld=_row_means(rows, scores.kld),
            )
        )
    return found


def _merged_rungs(reference: Reference, rows: ScoredRows, options: Options) -> list[Rung]:
    """Return the merged models that were captured (`edgetune reference --merged`)."""
    found = []
    for merge_base in merged.MERGE_BASES:
        stored = merged.read(reference, merge_base)
        if stored is None:
            continue
        scores = TokenScores(stored.kld, stored.top, stored.nll)
        found.append(
            Rung(
                name=f"merged {merge_base}",
                kind=MERGED,
                figures=metrics.figures(scores.first(len(rows.positions)), reference),
                merge_base=merge_base,
                row_kld=_row_means(rows, scores.kld),
                long_rows=_long_rows(reference, scores) if options.rows is None else [],
            )
        )
    return found


def measure_file(ladder: Ladder, file: Path, options: Options, bar: ProgressBar) -> Rung:
    """Measure one exported file: contract, divergences, greedy answers, task score."""
    reference = ladder.reference
    rows = reference.rows if options.rows is None else ladder.rows
    pairs = ladder.scores.rows if ladder.scores else []
    longest = max([*(len(ids) for ids, _, _ in rows), *map(len, pairs)])
    max_tokens = int(ladder.run.manifest.config["reference"]["max_new_tokens"])
    with load(file, threads=options.threads, context=_context(reference, longest, max_tokens), clip=True) as runtime:
        runtime.verify()
        _check_fits(runtime, longest)
        scoring.check_vocabulary(runtime, reference)
        agreed = contract.check(runtime, reference.contract, ladder.run.tokenizer, ladder.run.manifest.template_options)
        mass = HiddenMass()
        with bar(f"{file.name}: score") as progress:
            all_scores = scoring.score(runtime, reference, rows, progress, mass)
        scores = all_scores.first(len(ladder.rows.positions))
        with bar(f"{file.name}: greedy") as progress:
            agreement, fault = greedy.compare_answers(runtime, reference.greedy, _stop_ids(ladder.run), progress)
        score = None
        if reference.task and options.with_task:
            with bar(f"{file.name}: task") as progress:
                score = task.run_task(runtime, reference.task, max_tokens, progress)
        reward_scores = None
        if ladder.scores is not None and runtime.is_reward_model:
            with bar(f"{file.name}: pairs") as progress:
                reward_scores = measure_scores(runtime, ladder.scores, progress)
        metadata = runtime.metadata
        return Rung(
            name=file.name,
            figures=metrics.figures(scores, reference),
            task=score,
            scores=reward_scores,
            hidden=_hidden_rows(runtime, mass),
            file=file.name,
            path=file,
            size=runtime.size,
            contract=agreed.with_difference("stop", fault),
            is_quantized=runtime.is_quantized,
            notes=provenance.unsigned(metadata),
            mismatches=[*provenance.mismatches(metadata, ladder.run), *_missing_head(ladder, runtime)],
            detail=measure_detail(runtime, reference, ladder.rows, scores),
            merge_base=provenance.merge_base(metadata),
            is_onnx=runtime.format == "onnx",
            agreement=agreement,
            long_rows=_long_rows(reference, all_scores) if options.rows is None else [],
            row_kld=_row_means(ladder.rows, scores.kld),
        )


def _hidden_rows(runtime: Runtime, mass: HiddenMass) -> HiddenRows | None:
    if not runtime.hidden_rows:
        return None
    return HiddenRows(rows=runtime.hidden_rows, mean=mass.mean, largest=mass.largest, divergence=mass.divergence)


def _missing_head(ladder: Ladder, runtime: Runtime) -> list[str]:
    return [NO_HEAD] if ladder.scores is not None and not runtime.is_reward_model else []


def _stop_ids(run: RunDirectory) -> frozenset[int]:
    """Return the stop tokens of training."""
    if not (run.tokenizer / "tokenizer.json").is_file():
        return frozenset()
    return TextTokenizer.from_directory(run.tokenizer).stop_ids


def _row_means(rows: ScoredRows, kld: F64) -> list[float]:
    return [float(kld[where].mean()) if where.stop > where.start else float("nan") for _, _, where in rows]


def _long_rows(reference: Reference, scores: TokenScores) -> list[LongRow]:
    """Return the figures of each long row of the reference."""
    same = scores.top == reference.trained_top
    rows = list(reference.rows)[len(reference.rows) - reference.long_rows :]
    return [
        LongRow(tokens=len(ids), kld=float(np.mean(scores.kld[where])), same_top=float(np.mean(same[where])))
        for ids, _, where in rows
    ]


def _context(reference: Reference, longest: int, max_tokens: int) -> int:
    """Return a context for the longest row, and for the prompts of the task with their answers.

    The number of tokens of a prompt is known only once the file is open, with its context; a token is at least a byte.
    """
    rows = reference.task["rows"] if reference.task else []
    prompts = [sum(len(str(turn).encode()) for turn in row["messages"]) for row in rows]
    return max(longest, min(max(prompts, default=0) + _TEMPLATE, _LONGEST_PROMPT) + max_tokens)


def _check_fits(runtime: Runtime, longest: int) -> None:
    if longest > runtime.trained_context:
        raise RunDirectoryError(
            f"a held-out row has {longest} tokens, {runtime.path} was made for {runtime.trained_context}",
            "Train again with a smaller training.max_length",
        )
