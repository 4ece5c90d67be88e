"""What was measured, as a table for people and as JSON for everything else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import edgetune
from edgetune.config import GateConfig
from edgetune.runs.json_format import write_json
from edgetune.validation.contract import Contract
from edgetune.validation.gate import Miss
from edgetune.validation.loss_stage import largest_loss
from edgetune.validation.metrics import Mean
from edgetune.validation.rungs import Ladder, Rung
from edgetune.validation.sample_size import caution

VERSION = 1
NOTHING = "–"


def json_path(artifact: Path) -> Path:
    """Where the report of an exported file lies: beside it, model.gguf.validation.json."""
    return artifact.with_name(artifact.name + ".validation.json")


def write(path: Path, ladder: Ladder, files: Sequence[Rung], gate: GateConfig, misses: Sequence[Miss]) -> None:
    """The report of some of the ladder's files as JSON, atomically."""
    write_json(path, content(ladder, files, gate, misses))


def content(ladder: Ladder, files: Sequence[Rung], gate: GateConfig, misses: Sequence[Miss]) -> dict[str, Any]:
    """The report of some of the ladder's files: what `write` writes."""
    names = {rung.name for rung in files}
    own = [miss for miss in misses if miss.rung in names]
    reference = ladder.reference
    stored = {
        "version": VERSION,
        "edgetune": edgetune.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": ladder.run.path.name,
        "reference": {
            "rows": len(ladder.rows), "tokens": len(ladder.rows.positions), "vocabulary": reference.vocab_size,
            "caution": caution(len(ladder.rows), len(ladder.rows.positions)),
            "coding": reference.coding, "kld_is_lower_bound": reference.is_lower_bound, "info": reference.info,
        },
        "passed": not own,
        "gate": gate.model_dump(),
        "misses": [asdict(miss) | {"hint": miss.hint} for miss in own],
        "rungs": [_as_json(rung, ladder) for rung in (ladder.base, ladder.trained, *ladder.merged, *files)],
    }  # fmt: skip
    plain: dict[str, Any] = _plain(stored)
    return plain


def _as_json(rung: Rung, ladder: Ladder) -> dict[str, Any]:
    """All fields; a path by its name only, for a report is sent to other machines."""
    fields = asdict(rung)
    fields["file"] = rung.file.name if rung.file else None
    fields["stage"] = rung.stage
    fields["lost"] = asdict(largest_loss(ladder, rung)) if rung.file else None
    if rung.contract:
        fields["contract"]["holds"] = rung.contract.holds
    if rung.task:
        fields["task"]["share"] = rung.task.share
    return fields


def _plain(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


Cell = Callable[[Rung], str]


def table(ladder: Ladder, misses: Sequence[Miss]) -> RenderableType:
    """The ladder, 100 characters wide at most, and what has to be said about it."""
    at_least = "≥ " if ladder.reference.is_lower_bound else ""
    columns: list[tuple[str, Cell]] = [
        ("MB", lambda rung: f"{rung.size / 1e6:.1f}" if rung.size else ""),
        ("CE", lambda rung: f"{rung.figures.cross_entropy.value:.4f}"),
        ("PPL", lambda rung: _short(rung.figures.perplexity.value, 4)),
        ("mean KLD", lambda rung: _with_error(rung.figures.kld, at_least)),
        ("p99", lambda rung: _short(rung.figures.kld_percentiles["99"])),
        ("same top", lambda rung: _share(rung.figures.same_top.value)),
        ("recovery", lambda rung: NOTHING if rung.figures.recovery is None else f"{rung.figures.recovery:.4f}"),
        ("task", lambda rung: NOTHING if rung.task is None else _share(rung.task.share)),
    ]
    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    grid.add_column("", no_wrap=True)
    for title, _ in columns:
        grid.add_column(title, justify="right", no_wrap=True)
    closed = {miss.rung for miss in misses}
    for rung in ladder.rungs:
        style = "red" if rung.name in closed else "green" if rung.file else "dim"
        grid.add_row(Text(_name(rung), style=style), *(cell(rung) for _, cell in columns))
    return Group(grid, *(Text(line, style="dim") for line in _remarks(ladder)))


def _remarks(ladder: Ladder) -> list[str]:
    reference, floor = ladder.reference, ladder.trained.figures.kld.value
    bound = "; KLD is a lower bound (top-k reference)" if reference.is_lower_bound else ""
    lines = [
        "",
        f"{len(ladder.rows)} rows, {len(ladder.rows.positions)} tokens; KLD in nats per token ± standard error; "
        f"coding floor {_short(floor)}{bound}",
    ]
    doubt = caution(len(ladder.rows), len(ladder.rows.positions))
    if doubt:
        lines.append(f"{doubt}; more of them: edgetune reference RUN --rows FILE")
    if ladder.trained.figures.recovery is None:
        lines.append("recovery is not defined: training gained nothing on these rows")
    lines += [f"{_name(rung)}: {_contract(rung.contract)}" for rung in ladder.files if rung.contract]
    lines += [f"{_name(rung)}: {note}" for rung in ladder.files for note in rung.notes]
    for rung in ladder.files:
        if rung.task and rung.task.first_miss:
            miss = rung.task.first_miss
            lines.append(
                f"{_name(rung)}: first answer lost: asked {_cut(miss['prompt'])}, answered {_cut(miss['got'])}"
            )
    return lines


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 40 else text[:39] + "…")


def _name(rung: Rung) -> str:
    """At most 24 characters of it; the type, at the end, is what tells files apart."""
    name = rung.name.removesuffix(".gguf")
    return name if len(name) <= 24 else "…" + name[-23:]


def _contract(contract: Contract) -> str:
    if contract.holds:
        return f"contract holds: template, token ids, BOS and stops in {contract.conversations} conversations"
    return f"contract broken: {', '.join(difference.what for difference in contract.differences)}"


def _with_error(mean: Mean, prefix: str) -> str:
    if math.isnan(mean.value):
        return NOTHING
    return prefix + (
        _short(mean.value) if math.isnan(mean.error) else f"{_short(mean.value)} ± {_short(mean.error, 1)}"
    )


def _short(value: float, digits: int = 3) -> str:
    """0.0312, 1.2e-05, 13.5: three figures, in the shorter of the two forms."""
    if not math.isfinite(value):
        return NOTHING if math.isnan(value) else "∞"
    if 0 < abs(value) < 1e-4 or abs(value) >= 1e6:
        return f"{value:.0e}"
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:#.{digits}g}".rstrip(".")


def _share(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.1%}"
