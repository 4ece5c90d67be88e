"""The data of the page's charts as plain JSON. The scripts compute nothing that the page states in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.report import findings, survival
from edgetune.report.curves import Curves
from edgetune.report.gate_table import limit_of
from edgetune.report.gather import FileReport, ReportData
from edgetune.validation.numbers import number
from edgetune.validation.results import BASE, FILE, MERGED, TRAINED, Mean, Rung


@dataclass(frozen=True)
class Metric:
    """A figure that the ladder chart can show."""

    key: str
    title: str
    unit: str
    value: Callable[[Rung], Mean | float | None]
    is_log: bool
    """Whether a logarithmic scale shows more."""
    form: str
    """How the script formats it."""
    gate: str | None = None
    """The key of its threshold."""


METRICS: Sequence[Metric] = (
    Metric("kld", "KL divergence", "nats per token, mean", lambda rung: rung.figures.kld, True, "short",
           "mean_kld_max"),
    Metric("entropy", "Cross-entropy", "nats per token", lambda rung: rung.figures.cross_entropy, True, "short"),
    Metric("perplexity", "Perplexity", "", lambda rung: rung.figures.perplexity, True, "short4"),
    Metric("recovery", "Recovery", "share of the training gain", lambda rung: rung.figures.recovery, False, "percent",
           "recovery_min"),
    Metric("same", "Same top token", "share of tokens", lambda rung: rung.figures.same_top, False, "percent",
           "same_top_min"),
    Metric("task", "Task score", "share of correct answers", lambda rung: rung.task.share if rung.task else None, False,
           "percent"),
)  # fmt: skip


def chart_data(data: ReportData, curves: Curves, chosen: int) -> dict[str, Any]:
    """Return everything that the scripts need."""
    shown = [metric for metric in METRICS if any(_values(metric, file.rung)[0] is not None for file in data.files)]
    return {
        "chosen": chosen,
        "metrics": [
            {"key": metric.key, "title": metric.title, "unit": metric.unit, "log": metric.is_log, "form": metric.form,
             "limit": limit_of(data.files, metric.gate) if metric.gate else None}
            for metric in shown
        ],
        "rungs": [_rung(rung, None) for rung in data.stored] + [_rung(file.rung, file) for file in data.files],
        "files": [_file(file, data.files) for file in data.files],
        "kld_limit": limit_of(data.files, "mean_kld_max"),
        "curves": {
            "loss": curves.loss,
            "held_out": curves.held_out,
            "learning_rate": curves.learning_rate,
            "grad_norm": curves.grad_norm,
            "figures": [{"training": figure.training, "held_out": figure.held_out} for figure in curves.figures],
        },
    }  # fmt: skip


def _values(metric: Metric, rung: Rung) -> tuple[float | None, float | None]:
    """Return value and standard error."""
    found = metric.value(rung)
    return (number(found.value), number(found.error)) if isinstance(found, Mean) else (number(found), None)


def _rung(rung: Rung, file: FileReport | None) -> dict[str, Any]:
    kind = FILE if file else rung.kind if rung.kind in (BASE, TRAINED) else MERGED
    return {
        "name": file.short if file else rung.name,
        "kind": kind,
        "passed": _passed(file) if file else None,
        "values": {metric.key: _values(metric, rung) for metric in METRICS},
    }


def _passed(file: FileReport) -> bool | None:
    return {"pass": True, "fail": False}.get(file.state)


def _file(file: FileReport, files: Sequence[FileReport]) -> dict[str, Any]:
    figures, detail, located = file.rung.figures, file.rung.detail, file.rung.located
    percentiles = {key: number(value) for key, value in figures.kld_percentiles.items()}
    return {
        "name": file.name,
        "short": file.short,
        "size": file.size,
        "kld": file.kld,
        "passed": _passed(file),
        "front": findings.is_on_front(file, files),
        "percentiles": percentiles | {"max": number(figures.kld_max)},
        "histogram": detail.kld_histogram.model_dump(mode="json") if detail and detail.kld_histogram else None,
        "rows": [row.model_dump(mode="json") for row in detail.worst_rows] if detail else [],
        "survival": [
            {"layer": tensor.layer, "slot": tensor.slot, "type": tensor.type, "ratio": tensor.ratio}
            for tensor in survival.tensor_survival(file.receipt)
        ],
        "located": located.model_dump(mode="json") if located else None,
    }
