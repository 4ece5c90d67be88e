"""The page: templates, styles and scripts put together into one file that needs nothing else.

Nothing that comes from data is ever markup: text goes through jinja2's escaping, and the data of the charts stands in a
script element of type application/json in which `<`, `>`, `&` and the line separators of JavaScript are escaped. The
content security policy allows the page's own two scripts, by their hashes, and no network at all.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import edgetune
from edgetune.report import chart_data, findings, gate_table, numbers, receipt, survival, verdict
from edgetune.report.curves import curves
from edgetune.report.gather import FileReport, ReportData

VENDORED = ("d3.min.js", "plot.umd.min.js")
SCRIPTS = (
    "page.js", "ladder.js", "sizes.js", "spread.js", "tokens.js", "survival.js", "located.js", "training.js", "main.js",
)  # fmt: skip
STYLES = ("base.css", "parts.css", "tokens.css", "print.css")
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def write(path: Path, material: ReportData) -> None:
    """The report as one HTML file, whole or not at all."""
    text = render(material)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", errors="replace")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def render(material: ReportData) -> str:
    """The page's text."""
    learned = curves(material.log)
    judged = verdict.judge(material)
    library = "\n".join(_read("vendor", name) for name in VENDORED)
    own = "(() => {\n'use strict';\n" + "\n".join(_read("scripts", name) for name in SCRIPTS) + "})();"
    return _environment().get_template("page.html.jinja").render(
        policy=policy(library, own),
        styles=Markup("\n".join(_read("styles", name) for name in STYLES)),
        scripts=[Markup(library), Markup(own)],
        data=embedded(chart_data.data(material, learned, judged.chosen)),
        material=material,
        verdict=judged,
        columns=gate_table.columns(material.files),
        curves=learned,
        views=[_view(file, material) for file in material.files],
        chosen=material.files[judged.chosen],
        run_facts=receipt.run_facts(material.manifest),
        version=edgetune.__version__,
    )  # fmt: skip


def _view(file: FileReport, material: ReportData) -> dict[str, Any]:
    """One file, as the templates show it."""
    changed = survival.tensors(file.receipt)
    return {
        "file": file,
        "spread": findings.spread(file),
        "tokens": findings.tokens(file),
        "survival": findings.survival(changed),
        "weakest": survival.weakest(changed),
        "task": findings.task(file.rung, material.rung("trained")),
        "contract": receipt.contract(file),
        "facts": receipt.facts(file),
        "hashes": list(receipt.hashes(file)),
        "ladder": findings.ladder(material, file),
        "long_rows": findings.long_rows(file.rung),
        "located": findings.located(file.rung),
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
    }
    environment.globals |= {"cell": gate_table.cell, "entry": numbers.entry, "sizes": findings.sizes}
    return environment


def embedded(value: Any) -> Markup:
    """JSON that can stand in a script element, whatever its strings hold: no `</script>`, no `<!--`, no U+2028.

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
    """A content security policy that runs these scripts and no other, and loads nothing."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts
    )
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"


def _room() -> Traversable:
    return resources.files("edgetune.report")


def _read(folder: str, name: str) -> str:
    return (_room() / folder / name).read_text(encoding="utf-8")
