"""The page: templates, styles and scripts in one file that needs nothing else.

Data never becomes markup. Text is escaped by jinja2; the data of the charts is in a script element of type
application/json in which `<`, `>`, `&` and the line separators of JavaScript are escaped. The content security policy
allows the page's own two scripts, by their hashes, and no network access.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import edgetune
from edgetune.evaluation import table
from edgetune.evaluation.results import remarks
from edgetune.report import chart_data, facts, findings, gate_table, survival, verdict
from edgetune.report.curves import curves
from edgetune.report.gather import FileReport, ReportData
from edgetune.validation import numbers
from edgetune.validation.meaning import describe_hidden
from edgetune_converters.files import atomic

VENDORED = ("d3.min.js", "plot.umd.min.js")
SCRIPTS = (
    "page.js", "ladder.js", "sizes.js", "spread.js", "tokens.js", "survival.js", "located.js", "training.js", "main.js",
)  # fmt: skip
STYLES = ("base.css", "parts.css", "tokens.css", "print.css")
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def write_page(path: Path, data: ReportData) -> None:
    """Write the report as one HTML file, atomically."""
    atomic.write_text(path, render(data), errors="replace")


def render(data: ReportData) -> str:
    """Return the text of the page."""
    training = curves(data.log, str((data.manifest.config.get("objective") or {}).get("kind", "sft")))
    judged = verdict.judge(data)
    library = "\n".join(_read("vendor", name) for name in VENDORED)
    own = "(() => {\n'use strict';\n" + "\n".join(_read("scripts", name) for name in SCRIPTS) + "})();"
    return _environment().get_template("page.html.jinja").render(
        policy=policy(library, own),
        styles=Markup("\n".join(_read("styles", name) for name in STYLES)),
        scripts=[Markup(library), Markup(own)],
        chart_data=embedded(chart_data.chart_data(data, training, judged.chosen)),
        report=data,
        verdict=judged,
        columns=gate_table.columns(data.files),
        curves=training,
        views=[_view(file, data) for file in data.files],
        chosen=data.files[judged.chosen],
        run_facts=facts.run_facts(data.manifest),
        scored=findings.scored(data),
        scores_finding=findings.scores(data.files[judged.chosen]),
        version=edgetune.__version__,
    )  # fmt: skip


def _view(file: FileReport, data: ReportData) -> dict[str, Any]:
    """Return what the templates show of one file."""
    changed = survival.tensor_survival(file.receipt)
    return {
        "file": file,
        "spread": findings.spread(file),
        "tokens": findings.tokens(file),
        "survival": findings.survival(changed),
        "weakest": survival.weakest(changed),
        "task": findings.task(file.rung, data.rung("trained")),
        "contract": facts.contract_checks(file),
        "facts": facts.file_facts(file),
        "hashes": list(facts.hashes(file)),
        "ladder": findings.ladder(data, file),
        "long_rows": findings.long_rows(file.rung),
        "hidden": describe_hidden(file.rung.hidden, plain=False) if file.rung.hidden else "",
        "tensor_costs": findings.tensor_costs(file.rung),
    }


@functools.cache
def _environment() -> jinja2.Environment:
    folder = _room() / "templates"
    loader = jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8"))
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        name: getattr(numbers, name) for name in ("short", "share", "size", "with_error", "plural", "number")
    } | {
        "signed": table.signed,
        "begin": lambda text: f"{text[:1].upper()}{text[1:]}",
        "sentence": lambda text: text if not text or text.endswith((".", "?", "!")) else f"{text}.",
    }
    environment.globals |= {
        "cell": gate_table.cell, "sizes": findings.sizes, "describe_settings": table.describe_settings,
        "has_differences": table.has_differences, "score_rows": table.score_rows, "evaluation_remarks": remarks,
    }  # fmt: skip
    return environment


def embedded(value: Any) -> Markup:
    """Return JSON that is safe in a script element, whatever its strings hold: no `</script>`, `<!--` or U+2028.

    NaN and infinity become null; lone surrogates become U+FFFD.
    """
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character, escape in _ESCAPES.items():
        text = text.replace(character, escape)
    return Markup(text.encode("utf-8", "replace").decode("utf-8"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and numbers.number(value) is None else value


def policy(*scripts: str) -> str:
    """Return a content security policy that runs these scripts and no others, and loads nothing."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts
    )
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"


def _room() -> Traversable:
    return resources.files("edgetune.report")


def _read(folder: str, name: str) -> str:
    return (_room() / folder / name).read_text(encoding="utf-8")
