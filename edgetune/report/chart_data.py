"""What the page's charts draw, as plain JSON: the scripts compute nothing that is said elsewhere in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgetune.report import findings, survival
from edgetune.report.curves import Curves
from edgetune.report.gate_table import limit_of
from edgetune.report.gather import FileReport, Json, ReportData
from edgetune.report.numbers import entry, number

# title, unit, path of value and error, whether a logarithmic scale shows more, key of the threshold, is less better
METRICS: Sequence[dict[str, Any]] = (
    {"key": "kld", "title": "KL divergence", "unit": "nats per token, mean", "path": ("kld",), "log": True,
     "gate": "mean_kld_max", "form": "short"},
    {"key": "entropy", "title": "Cross-entropy", "unit": "nats per token", "path": ("cross_entropy",), "log": True,
     "gate": None, "form": "short"},
    {"key": "perplexity", "title": "Perplexity", "unit": "", "path": ("perplexity",), "log": True, "gate": None,
     "form": "short4"},
    {"key": "recovery", "title": "Recovery", "unit": "share of the gain", "path": ("recovery",), "log": False,
     "gate": "recovery_min", "form": "percent"},
    {"key": "same", "title": "Same top token", "unit": "share of tokens", "path": ("same_top",), "log": False,
     "gate": "same_top_min", "form": "percent"},
    {"key": "task", "title": "Task score", "unit": "share of answers that are right", "path": (), "log": False,
     "gate": None, "form": "percent"},
)  # fmt: skip


def data(material: ReportData, curves: Curves, chosen: int) -> dict[str, Any]:
    """All that the scripts need."""
    return {
        "chosen": chosen,
        "metrics": [_metric(metric, material) for metric in METRICS if _is_known(metric, material)],
        "rungs": [_rung(rung, None) for rung in material.stored] + [_rung(file.rung, file) for file in material.files],
        "files": [_file(file, material.files) for file in material.files],
        "kld_limit": limit_of(material.files, "mean_kld_max"),
        "curves": {
            "loss": curves.loss,
            "held_out": curves.held_out,
            "learning_rate": curves.learning_rate,
            "grad_norm": curves.grad_norm,
        },
    }


def _is_known(metric: Mapping[str, Any], material: ReportData) -> bool:
    return any(_values(metric, file.rung)[0] is not None for file in material.files)


def _metric(metric: Mapping[str, Any], material: ReportData) -> dict[str, Any]:
    limit = limit_of(material.files, metric["gate"]) if metric["gate"] else None
    return {key: metric[key] for key in ("key", "title", "unit", "log", "form")} | {"limit": limit}


def _values(metric: Mapping[str, Any], rung: Json) -> tuple[float | None, float | None]:
    """Value and standard error."""
    found = entry(rung, "figures", *metric["path"]) if metric["path"] else entry(rung, "task", "share")
    if isinstance(found, Mapping):
        return number(found.get("value")), number(found.get("error"))
    return number(found), None


def _rung(rung: Json, file: FileReport | None) -> dict[str, Any]:
    kind = "file" if file else str(rung.get("kind") or rung["name"])
    return {
        "name": file.short if file else rung["name"],
        "kind": kind if kind in ("base", "trained", "file") else "merged",
        "passed": not file.misses if file else None,
        "values": {metric["key"]: _values(metric, rung) for metric in METRICS},
    }


def _file(file: FileReport, files: Sequence[FileReport]) -> dict[str, Any]:
    figures = file.rung.get("figures", {})
    percentiles = {key: number(value) for key, value in (figures.get("kld_percentiles") or {}).items()}
    return {
        "name": file.name,
        "short": file.short,
        "size": file.size,
        "kld": file.kld,
        "passed": not file.misses,
        "front": findings.is_on_front(file, files),
        "percentiles": percentiles | {"max": number(figures.get("kld_max"))},
        "histogram": entry(file.rung, "detail", "kld_histogram"),
        "rows": entry(file.rung, "detail", "worst_rows") or [],
        "survival": [
            {"layer": tensor.layer, "slot": tensor.slot, "type": tensor.type, "ratio": tensor.ratio}
            for tensor in survival.tensors(file.receipt)
        ],
        "located": file.rung.get("located"),
    }
