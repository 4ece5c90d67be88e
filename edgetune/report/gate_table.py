"""The gate as a table: each file against the contract, its origin and every threshold that is set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from edgetune.report.gather import FileReport, Json
from edgetune.report.numbers import NOTHING, entry, number, share, short
from edgetune.validation.gate import THRESHOLDS


@dataclass(frozen=True)
class GateColumn:
    """One check."""

    key: str
    title: str
    limit: str
    """≤ 0.05; empty for checks that only hold or fail, and where files were held against different limits."""


@dataclass(frozen=True)
class GateCell:
    """One file in one check."""

    state: str
    """pass, fail or none (not checked)."""
    text: str


@dataclass(frozen=True)
class MissedCheck:
    """What a file fails, in words: for the head of the report."""

    file: str
    what: str
    distance: str
    """How far from the limit; empty where there is no number."""
    stage: str
    hint: str


def _task_drop(rung: Json, validation: Json) -> float | None:
    shares = [number(entry(each, "task", "share")) for each in (_trained(validation), rung)]
    return None if shares[0] is None or shares[1] is None else shares[0] - shares[1]


def _long_kld(rung: Json, _: Json) -> float | None:
    return max(
        (value for row in rung.get("long_rows") or [] if (value := number(row.get("kld"))) is not None), default=None
    )


def _trained(validation: Json) -> Json:
    return next((rung for rung in validation["rungs"] if rung["name"] == "trained"), {})


def _figure(*path: str) -> Callable[[Json, Json], float | None]:
    return lambda rung, _: number(entry(rung, "figures", *path))


# key of the gate -> (the figure, how it is written); a threshold that is not here is shown as met or missed only
FIGURES: Mapping[str, tuple[Callable[[Json, Json], float | None], Callable[[float], str]]] = {
    "mean_kld_max": (_figure("kld", "value"), short),
    "same_top_min": (_figure("same_top", "value"), share),
    "perplexity_ratio_max": (_figure("perplexity_ratio", "value"), lambda value: short(value, 4)),
    "recovery_min": (_figure("recovery"), lambda value: f"{value:.4f}"),
    "task_drop_max": (_task_drop, share),
    "agreement_min": (lambda rung, _: number(entry(rung, "agreement", "mean")), share),
    "long_kld_max": (_long_kld, short),
}
TITLES = {
    "mean_kld_max": "Mean KLD", "same_top_min": "Same top", "perplexity_ratio_max": "PPL ratio",
    "recovery_min": "Recovery", "task_drop_max": "Task drop", "agreement_min": "Agreement",
    "long_kld_max": "KLD, long rows",
}  # fmt: skip
_ALWAYS = {"contract": "Contract", "origin": "Origin"}


def columns(files: Sequence[FileReport]) -> list[GateColumn]:
    """Contract and origin, which are always checked, and each threshold that some file was held against."""
    found = [GateColumn(key, title, "") for key, title in _ALWAYS.items()]
    failed = [str(miss.get("figure")) for file in files for miss in file.misses]
    keys = dict.fromkeys([*(key for file in files for key in _limits(file)), *failed])
    for key in (key for key in keys if key not in _ALWAYS):
        limits = {_limits(file).get(key) for file in files}
        title = TITLES.get(key) or key.replace("_", " ")
        found.append(GateColumn(key, title, _limit(key, limits.pop()) if len(limits) == 1 else ""))
    return found


def cell(file: FileReport, column: GateColumn) -> GateCell:
    """Whether a file passes one check, and with what figure."""
    failed = any(miss.get("figure") == column.key for miss in file.misses)
    if column.key in _ALWAYS:
        known = column.key != "contract" or file.rung.get("contract") is not None
        return GateCell("fail" if failed else "pass" if known else "none", _held(file, column.key, failed))
    limit = _limits(file).get(column.key)
    if limit is None and not failed:
        return GateCell("none", NOTHING)
    text, state = _value(file, column.key), "fail" if failed else "pass"
    return GateCell(state, text if column.limit or limit is None else f"{text} ({_limit(column.key, limit)})")


def _held(file: FileReport, key: str, failed: bool) -> str:
    if failed:
        return "broken" if key == "contract" else "another"
    if key == "origin":
        return "unknown" if file.rung.get("notes") else "this run"
    return NOTHING if file.rung.get("contract") is None else "holds"


def _limits(file: FileReport) -> dict[str, float]:
    gate = file.validation.get("gate") or {}
    return {key: limit for key, value in gate.items() if (limit := number(value)) is not None}


def _limit(key: str, limit: float | None) -> str:
    if limit is None:
        return ""
    is_maximum = THRESHOLDS[key].is_maximum if key in THRESHOLDS else key.endswith("_max")
    return f"{'≤' if is_maximum else '≥'} {_written(key, limit)}"


def _written(key: str, value: float) -> str:
    """The limit, with no more figures than were asked for."""
    is_share = key in FIGURES and FIGURES[key][1] is share
    return share(value, 0 if value == round(value, 2) else 1) if is_share else f"{value:g}"


def _value(file: FileReport, key: str) -> str:
    if key not in FIGURES:
        return NOTHING
    read, write = FIGURES[key]
    value = read(file.rung, file.validation)
    return NOTHING if value is None else write(value)


def limit_of(files: Sequence[FileReport], key: str) -> float | None:
    """The threshold, where all files were held against the same one."""
    limits = {_limits(file).get(key) for file in files}
    return limits.pop() if len(limits) == 1 else None


def misses(file: FileReport) -> list[MissedCheck]:
    """Every check that the file fails."""
    return [_miss(file, stored) for stored in file.misses]


def _miss(file: FileReport, stored: Json) -> MissedCheck:
    key, stage = str(stored.get("figure", "")), str(stored.get("stage", ""))
    sentence = str(stored.get("sentence", "")).partition(" (" + key + ")")[0]
    return MissedCheck(file.short, sentence, _distance(file, key), stage, str(stored.get("hint") or ""))


def _distance(file: FileReport, key: str) -> str:
    """How far a figure is from its threshold: as a factor for what can be scaled, else as a difference."""
    limit = _limits(file).get(key)
    value = FIGURES[key][0](file.rung, file.validation) if key in FIGURES else None
    if limit is None or value is None:
        return ""
    if FIGURES[key][1] is share:
        return f"{100 * abs(value - limit):.1f} points {'above' if value > limit else 'below'} the limit"
    if FIGURES[key][1] is short and limit > 0:
        return f"{short(value / limit)} times the limit"
    return f"{short(abs(value - limit))} {'above' if value > limit else 'below'} the limit"
