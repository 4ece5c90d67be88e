"""The head of the report: passed or failed, which file to ship, what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgetune.report import gate_table
from edgetune.report.gate_table import MissedCheck
from edgetune.report.gather import FileReport, ReportData
from edgetune.validation import gate
from edgetune.validation.numbers import NOTHING, number, plural, share, short, size
from edgetune.validation.sample_size import caution


@dataclass(frozen=True)
class Tile:
    """One figure of the chosen file."""

    title: str
    value: str
    note: str


@dataclass(frozen=True)
class Verdict:
    """The first statement of the report."""

    state: str
    """passed; failed: every file misses a check; incomplete: none does, and no file is fully measured; unjudged: no
    threshold is set; mixed."""
    word: str
    headline: str
    """One sentence."""
    basis: str
    """The rows, tokens and thresholds behind the verdict."""
    misses: list[MissedCheck]
    unmeasured: list[str]
    """One sentence for each threshold that was not measured."""
    next_step: str
    chosen: int
    """Index of the file that the report opens with."""
    tiles: list[Tile]


_STATES = {"pass": "passed", "fail": "failed", "none": "incomplete", "unjudged": "unjudged"}
# state of a file -> (of one, of several), after "1 of 3 files"
_VERBS = {
    "fail": ("fails the gate", "fail the gate"),
    "none": ("is not fully measured", "are not fully measured"),
    "unjudged": ("has no threshold to meet", "have no threshold to meet"),
}
_WORDS = {
    "passed": "Gate passed",
    "failed": "Gate failed",
    "incomplete": "Gate not fully measured",
    "unjudged": "No threshold is set",
}


def judge(data: ReportData) -> Verdict:
    """Return the verdict on all files."""
    files = data.files
    groups = {state: [file for file in files if file.state == state] for state in _STATES}
    best = groups["pass"] or groups["unjudged"] or groups["none"] or files
    chosen = min(best, key=lambda file: (file.size or 0, file.kld or 0))
    state = _STATES[files[0].state] if len({file.state for file in files}) == 1 else "mixed"
    parts = [
        f"{len(groups[each])} of {plural(len(files), 'file')} {verbs[len(groups[each]) > 1]}"
        for each, verbs in _VERBS.items()
        if groups[each]
    ]
    return Verdict(
        state=state,
        word=_WORDS.get(state, ", ".join(parts)),
        headline=_headline(data, chosen),
        basis=_basis(data, groups["pass"]),
        misses=[miss for file in files for miss in gate_table.misses(file)],
        unmeasured=[
            f"{each.rung}: {gate.THRESHOLDS[each.figure].words if each.figure in gate.THRESHOLDS else each.figure} "
            f"was not measured: {each.reason}."
            for file in files
            for each in file.unmeasured
        ],
        next_step=_next_step(files, chosen),
        chosen=files.index(chosen),
        tiles=_tiles(data, chosen),
    )


def _headline(data: ReportData, chosen: FileReport) -> str:
    """Return what is true of the chosen file: that it meets every threshold, or its figures where none is set."""
    single = len(data.files) == 1
    named = chosen.name if single else f"{chosen.name} ({size(chosen.size)})"
    if chosen.state == "pass":
        return f"{named} meets every threshold."
    if chosen.state == "unjudged":
        return f"{named} {_figures(chosen)}."
    if chosen.state == "none":
        return f"{chosen.name} misses no threshold, but some were not measured."
    return f"{chosen.name} fails the gate." if single else "Each of these files fails the gate."


def _figures(file: FileReport) -> str:
    """Return the figures that say most about a file, as a predicate."""
    scores, figures = file.rung.scores, file.rung.figures
    if scores is not None:
        return (
            f"ranks {share(scores.accuracy)} of the pairs as labelled ({share(scores.trained_accuracy)} as trained), "
            f"and {share(scores.flips)} in another order than the trained model"
        )
    top = f"has the trained model's top token at {share(figures.same_top.value)} of the tokens"
    if number(figures.recovery) is None:
        return top
    return f"keeps {share(figures.recovery)} of the training gain, and {top}"


def _basis(data: ReportData, passing: Sequence[FileReport]) -> str:
    reference = data.newest.reference
    counted = f"{plural(reference.rows, 'held-out row')}, {plural(reference.tokens, 'scored token')}"
    text = f"Measured on {counted}, compared with the trained model."
    doubt = caution(reference.rows, reference.tokens)
    if doubt:
        text += f" {doubt[:1].upper()}{doubt[1:]}."
    if len(data.files) == 1 or not passing:
        return text
    each = "All" if len(passing) == len(data.files) else f"{len(passing)} of"
    return f"{text} {each} {plural(len(data.files), 'file')} pass; this is the smallest that does."


def _next_step(files: Sequence[FileReport], chosen: FileReport) -> str:
    if chosen.state == "none":
        return "Validate again with everything that the thresholds need, or remove the threshold (--gate KEY=)."
    if chosen.state == "fail":
        return next((miss.hint for file in files for miss in gate_table.misses(file) if miss.hint), "")
    if chosen.state == "unjudged":
        return "Only contract and origin were checked. Set thresholds under gate: in the configuration."
    return "Ship the file with its receipt. On the target machine, edgetune verify checks it."


def _tiles(data: ReportData, file: FileReport) -> list[Tile]:
    figures, scores = file.rung.figures, file.rung.scores
    bound = "a lower bound, " if file.validation.reference.kld_is_lower_bound else ""
    tiles = [
        Tile("Mean KL divergence", short(file.kld), f"nats per token, {bound}± {short(figures.kld.error, 1)}"),
        Tile("Same top token", share(figures.same_top.value), "of the tokens, compared with the trained model"),
    ]
    if scores is not None:
        return [
            Tile("Pair accuracy", share(scores.accuracy), f"{share(scores.trained_accuracy)} before the export"),
            Tile("Pairs in another order", share(scores.flips), f"of {scores.pairs:,} pairs"),
            Tile(
                "Score difference", short(scores.mean_difference),
                f"on average, {short(scores.max_difference)} at most; scores vary by {short(scores.trained_spread)}",
            ),
            tiles[0],
            _size_tile(file),
        ]  # fmt: skip
    tiles.append(Tile("Recovery", share(figures.recovery, 2), "of the training gain survives the export"))
    if file.rung.task:
        trained = data.rung("trained")
        before = trained.task.share if trained and trained.task else None
        tiles.append(Tile("Task score", share(file.rung.task.share), f"{share(before)} before the export"))
    return [*tiles, _size_tile(file)]


def _size_tile(file: FileReport) -> Tile:
    bits = number(file.receipt.bits_per_weight) if file.receipt else None
    return Tile("Size", size(file.size), f"{bits:.2f} bits per weight" if bits is not None else NOTHING)
