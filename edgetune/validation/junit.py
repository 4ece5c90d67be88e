"""The gate as a JUnit report, which continuous integration shows as tests: one case a check of each file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from edgetune.config import GateConfig
from edgetune.validation.gate import Miss, limits
from edgetune.validation.rungs import Ladder, Rung


def write(path: Path, ladder: Ladder, gate: GateConfig, misses: Sequence[Miss]) -> None:
    """Whole or not at all."""
    suites = ElementTree.Element("testsuites", name="edgetune validate")
    for rung in ladder.files:
        suites.append(_suite(ladder, rung, gate, [miss for miss in misses if miss.rung == rung.name]))
    ElementTree.indent(suites)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        ElementTree.ElementTree(suites).write(partial, encoding="utf-8", xml_declaration=True)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _suite(ladder: Ladder, rung: Rung, gate: GateConfig, misses: Sequence[Miss]) -> ElementTree.Element:
    checks = list(dict.fromkeys([*_checks(rung, gate), *(miss.figure for miss in misses)]))
    failed = {miss.figure for miss in misses}
    suite = ElementTree.Element(
        "testsuite", name=rung.name, tests=str(len(checks)), failures=str(len(failed)), errors="0", skipped="0"
    )
    for check in checks:
        case = ElementTree.SubElement(suite, "testcase", classname=f"{ladder.run.path.name}.{rung.name}", name=check)
        for miss in (miss for miss in misses if miss.figure == check):
            message = f"{miss.sentence}; lost at: {miss.stage}"
            ElementTree.SubElement(case, "failure", message=_clean(message), type=miss.figure).text = miss.hint
    return suite


def _checks(rung: Rung, gate: GateConfig) -> Iterator[str]:
    """What was looked at."""
    yield "origin"
    if rung.contract is not None:
        yield "contract"
    yield from limits(gate)


def _clean(text: str) -> str:
    """Without the control characters that XML cannot say at all."""
    return "".join(each if each >= " " or each in "\t\n\r" else "\N{REPLACEMENT CHARACTER}" for each in text)
