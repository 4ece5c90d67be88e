"""The gate as a table: each file against the contract, its origin and every threshold that is set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgetune.report.gather import FileReport
from edgetune.validation.gate import THRESHOLDS
from edgetune.validation.numbers import NOTHING, number, share, short
from edgetune.validation.results import Miss


@dataclass(frozen=True)
class GateColumn:
    """One check."""

    key: str
    title: str
    limit: str
    """≤ 0.05; empty for checks without a limit, and where the files have different limits."""


@dataclass(frozen=True)
class GateCell:
    """The result of one check for one file."""

    state: str
    """pass, fail or none (not checked)."""
    text: str


@dataclass(frozen=True)
class MissedCheck:
    """A check that a file misses, in words: for the head of the report."""

    file: str
    what: str
    distance: str
    """From the limit; empty where there is no number."""
    stage: str
    hint: str


_ALWAYS = {"contract": "Contract", "origin": "Origin"}


def columns(files: Sequence[FileReport]) -> list[GateColumn]:
    """Return the columns: contract, origin, and each threshold that is set for some file."""
    found = [GateColumn(key, title, "") for key, title in _ALWAYS.items()]
    missed = [miss.figure for file in files for miss in file.misses]
    keys = dict.fromkeys([*(key for file in files for key in _limits(file)), *missed])
    for key in (key for key in keys if key not in _ALWAYS):
        limits = {_limits(file).get(key) for file in files}
        title = THRESHOLDS[key].title if key in THRESHOLDS else key.replace("_", " ")
        found.append(GateColumn(key, title, _format_limit(key, limits.pop()) if len(limits) == 1 else ""))
    return found


def cell(file: FileReport, column: GateColumn) -> GateCell:
    """Return whether a file passes one check, and its figure."""
    missed = any(miss.figure == column.key for miss in file.misses)
    if column.key == "contract":
        contract = file.rung.contract
        text = "broken" if missed else NOTHING if contract is None else "holds"
        return GateCell("fail" if missed else "pass" if contract else "none", text)
    if column.key == "origin":
        text = "another" if missed else "unknown" if file.rung.notes else "this run"
        return GateCell("fail" if missed else "none" if file.rung.notes else "pass", text)
    limit = _limits(file).get(column.key)
    if limit is None and not missed:
        return GateCell("none", NOTHING)
    if any(each.figure == column.key for each in file.unmeasured) or (_value(file, column.key) is None and not missed):
        return GateCell("none", "not measured")
    text = _format_value(column.key, _value(file, column.key))
    text = text if column.limit or limit is None else f"{text} ({_format_limit(column.key, limit)})"
    return GateCell("fail" if missed else "pass", text)


def _limits(file: FileReport) -> dict[str, float]:
    return {key: limit for key, value in file.validation.gate.items() if (limit := number(value)) is not None}


def _value(file: FileReport, key: str) -> float | None:
    """Return the figure that the threshold limits; None where it was not measured or is not defined."""
    return number(THRESHOLDS[key].value(file.validation.rungs, file.rung)) if key in THRESHOLDS else None


def _format_value(key: str, value: float | None) -> str:
    if value is None:
        return NOTHING
    return share(value) if THRESHOLDS[key].is_share else short(value, THRESHOLDS[key].digits)


def _format_limit(key: str, limit: float | None) -> str:
    """Format the limit with no more digits than were given."""
    if limit is None:
        return ""
    threshold = THRESHOLDS.get(key)
    is_maximum = threshold.is_maximum if threshold else key.endswith("_max")
    places = 0 if limit == round(limit, 2) else 1
    text = share(limit, places) if threshold and threshold.is_share else f"{limit:g}"
    return f"{'≤' if is_maximum else '≥'} {text}"


def limit_of(files: Sequence[FileReport], key: str) -> float | None:
    """Return the limit, if it is the same for all files."""
    limits = {_limits(file).get(key) for file in files}
    return limits.pop() if len(limits) == 1 else None


def misses(file: FileReport) -> list[MissedCheck]:
    """Return every check that the file misses."""
    return [_missed_check(file, miss) for miss in file.misses]


def _missed_check(file: FileReport, miss: Miss) -> MissedCheck:
    sentence = miss.sentence.partition(f" ({miss.figure})")[0]
    return MissedCheck(file.short, sentence, _distance(file, miss.figure), miss.stage, miss.hint or "")


def _distance(file: FileReport, key: str) -> str:
    """Return the distance from the limit: a factor for a divergence, else a difference."""
    limit, value = _limits(file).get(key), _value(file, key)
    if limit is None or value is None:
        return ""
    side = f"{'above' if value > limit else 'below'} the limit"
    if THRESHOLDS[key].is_share:
        return f"{100 * abs(value - limit):.1f} points {side}"
    if key in ("mean_kld_max", "long_kld_max") and limit > 0:
        return f"{short(value / limit)} times the limit"
    return f"{short(abs(value - limit))} {side}"
