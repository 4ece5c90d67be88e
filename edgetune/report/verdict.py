"""The head of the report: passed or failed, which file to ship, what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgetune.report import gate_table
from edgetune.report.gate_table import MissedCheck
from edgetune.report.gather import FileReport, ReportData
from edgetune.report.numbers import NOTHING, entry, number, plural, share, short, size
from edgetune.validation.sample_size import caution


@dataclass(frozen=True)
class Tile:
    """One figure of the chosen file."""

    title: str
    value: str
    note: str


@dataclass(frozen=True)
class Verdict:
    """What is said first."""

    state: str
    """passed, failed (no file passes) or mixed."""
    word: str
    headline: str
    """One sentence."""
    basis: str
    """What it rests on: rows, tokens, thresholds."""
    misses: list[MissedCheck]
    next_step: str
    chosen: int
    """Index of the file that the report opens with."""
    tiles: list[Tile]


def judge(material: ReportData) -> Verdict:
    """The verdict on all files."""
    files = material.files
    passing = [file for file in files if not file.misses]
    chosen = min(passing or files, key=lambda file: (file.size or 0, file.kld or 0))
    state = "failed" if not passing else "passed" if len(passing) == len(files) else "mixed"
    failing = len(files) - len(passing)
    verb = "fails" if failing == 1 else "fail"
    mixed = f"{failing} of {plural(len(files), 'file')} {verb} the gate"
    words = {"passed": "Gate passed", "failed": "Gate failed", "mixed": mixed}
    misses = [miss for file in files for miss in gate_table.misses(file)]
    return Verdict(
        state, words[state], _headline(files, passing, chosen), _basis(material, passing), misses,
        _next_step(files, passing, chosen), files.index(chosen), _tiles(material, chosen),
    )  # fmt: skip


def _headline(files: Sequence[FileReport], passing: Sequence[FileReport], chosen: FileReport) -> str:
    if len(files) == 1:
        return f"{chosen.name} is the model that was trained." if passing else f"{chosen.name} is not fit to ship."
    if not passing:
        return "None of these files is the model that was trained."
    return f"{chosen.name} ({size(chosen.size)}) is the model that was trained."


def _basis(material: ReportData, passing: Sequence[FileReport]) -> str:
    reference = material.newest.get("reference", {})
    rows, tokens = (number(reference.get(key)) for key in ("rows", "tokens"))
    counted = f"{plural(int(rows or 0), 'held-out row')}, {plural(int(tokens or 0), 'scored token')}"
    measured = f"Measured on {counted} against the model as it was trained."
    doubt = caution(int(rows or 0), int(tokens or 0))
    if doubt:
        measured += f" {doubt[:1].upper()}{doubt[1:]}."
    if len(material.files) == 1 or not passing:
        return measured
    each = "All" if len(passing) == len(material.files) else f"{len(passing)} of"
    return f"{measured} {each} {plural(len(material.files), 'file')} pass; this is the smallest that does."


def _next_step(files: Sequence[FileReport], passing: Sequence[FileReport], chosen: FileReport) -> str:
    if not passing:
        return next((miss.hint for file in files for miss in gate_table.misses(file) if miss.hint), "")
    if not any(number(limit) is not None for limit in (chosen.validation.get("gate") or {}).values()):
        return "No threshold is set: only contract and origin were checked. Set some under gate: in the configuration."
    return "Ship it with its receipt; edgetune verify checks it on the machine where it runs."


def _tiles(material: ReportData, file: FileReport) -> list[Tile]:
    figures = file.rung.get("figures", {})
    bound = "a lower bound, " if entry(file.validation, "reference", "kld_is_lower_bound") else ""
    recovery = number(figures.get("recovery"))
    task = file.rung.get("task")
    tiles = [
        Tile(
            "Mean KL divergence",
            short(file.kld),
            f"nats per token, {bound}± {short(entry(figures, 'kld', 'error'), 1)}",
        ),
        Tile("Same top token", share(entry(figures, "same_top", "value")), "of tokens, as the trained model"),
        Tile("Recovery", share(recovery, 2), "of the gain of training has arrived"),
    ]
    if task:
        trained = number(entry(material.rung("trained"), "task", "share"))
        tiles.append(Tile("Task score", share(task.get("share")), f"{share(trained)} before export"))
    return [*tiles, Tile("Size", size(file.size), _bits(file))]


def _bits(file: FileReport) -> str:
    bits = number(file.receipt.get("bits_per_weight"))
    return f"{bits:.2f} bits per weight" if bits is not None else NOTHING
