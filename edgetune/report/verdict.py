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
    """passed; failed: every file misses a check; incomplete: none does, and no file is fully measured; mixed."""
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


def judge(data: ReportData) -> Verdict:
    """Return the verdict on all files."""
    files = data.files
    passing = [file for file in files if file.state == "pass"]
    incomplete = [file for file in files if file.state == "none"]
    failing = [file for file in files if file.state == "fail"]
    chosen = min(passing or incomplete or files, key=lambda file: (file.size or 0, file.kld or 0))
    state = (
        "passed" if len(passing) == len(files)
        else "failed" if len(failing) == len(files)
        else "incomplete" if not passing and not failing
        else "mixed"
    )  # fmt: skip
    parts = [
        f"{len(group)} of {plural(len(files), 'file')} {verb}"
        for group, verb in (
            (failing, "fails the gate" if len(failing) == 1 else "fail the gate"),
            (incomplete, "is not fully measured" if len(incomplete) == 1 else "are not fully measured"),
        )
        if group
    ]
    words = {"passed": "Gate passed", "failed": "Gate failed", "incomplete": "Gate not fully measured"}
    return Verdict(
        state=state,
        word=words.get(state, ", ".join(parts)),
        headline=_headline(files, passing, incomplete, chosen),
        basis=_basis(data, passing),
        misses=[miss for file in files for miss in gate_table.misses(file)],
        unmeasured=[
            f"{each.rung}: {gate.THRESHOLDS[each.figure].words if each.figure in gate.THRESHOLDS else each.figure} "
            f"was not measured: {each.reason}."
            for file in files
            for each in file.unmeasured
        ],
        next_step=_next_step(files, passing, incomplete, chosen),
        chosen=files.index(chosen),
        tiles=_tiles(data, chosen),
    )


def _headline(
    files: Sequence[FileReport], passing: Sequence[FileReport], incomplete: Sequence[FileReport], chosen: FileReport
) -> str:
    if passing:
        named = chosen.name if len(files) == 1 else f"{chosen.name} ({size(chosen.size)})"
        return f"{named} matches the trained model."
    if incomplete:
        return f"{chosen.name} misses no threshold, but some were not measured."
    return f"{chosen.name} is not fit to ship." if len(files) == 1 else "None of these files matches the trained model."


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


def _next_step(
    files: Sequence[FileReport], passing: Sequence[FileReport], incomplete: Sequence[FileReport], chosen: FileReport
) -> str:
    if not passing and incomplete:
        return "Validate again with everything that the thresholds need, or remove the threshold (--gate KEY=)."
    if not passing:
        return next((miss.hint for file in files for miss in gate_table.misses(file) if miss.hint), "")
    if not any(number(limit) is not None for limit in chosen.validation.gate.values()):
        return "No threshold is set: only contract and origin were checked. Set some under gate: in the configuration."
    return "Ship the file with its receipt. On the target machine, edgetune verify checks it."


def _tiles(data: ReportData, file: FileReport) -> list[Tile]:
    figures = file.rung.figures
    bound = "a lower bound, " if file.validation.reference.kld_is_lower_bound else ""
    tiles = [
        Tile("Mean KL divergence", short(file.kld), f"nats per token, {bound}± {short(figures.kld.error, 1)}"),
        Tile("Same top token", share(figures.same_top.value), "of the tokens, compared with the trained model"),
        Tile("Recovery", share(figures.recovery, 2), "of the training gain survives the export"),
    ]
    if file.rung.task:
        trained = data.rung("trained")
        before = trained.task.share if trained and trained.task else None
        tiles.append(Tile("Task score", share(file.rung.task.share), f"{share(before)} before the export"))
    bits = number(file.receipt.bits_per_weight) if file.receipt else None
    return [*tiles, Tile("Size", size(file.size), f"{bits:.2f} bits per weight" if bits is not None else NOTHING)]
