"""The gate as a JUnit report, which continuous integration shows as tests: one case per check and file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from edgetune.validation.gate import limits
from edgetune.validation.results import Rung, ValidationResults
from edgetune_converters.files import atomic


def write_junit(path: Path, results: ValidationResults) -> None:
    """Write the report, atomically. A threshold that was not measured is a skipped case."""
    suites = ElementTree.Element("testsuites", name="edgetune validate")
    for rung in results.files:
        suites.append(_suite(results, rung))
    ElementTree.indent(suites)
    with atomic.replacing(path) as temporary:
        ElementTree.ElementTree(suites).write(temporary, encoding="utf-8", xml_declaration=True)


def _suite(results: ValidationResults, rung: Rung) -> ElementTree.Element:
    misses = results.misses_of(rung.name)
    skipped = {each.figure: each.reason for each in results.unmeasured_of(rung.name)}
    checks = list(dict.fromkeys([*_checks(results, rung), *(miss.figure for miss in misses)]))
    failed = {miss.figure for miss in misses}
    suite = ElementTree.Element(
        "testsuite", name=rung.name, tests=str(len(checks)), failures=str(len(failed)), errors="0",
        skipped=str(len(skipped)),
    )  # fmt: skip
    for check in checks:
        case = ElementTree.SubElement(suite, "testcase", classname=f"{results.run}.{rung.name}", name=check)
        if check in skipped:
            ElementTree.SubElement(case, "skipped", message=_without_controls(f"not measured: {skipped[check]}"))
        for miss in (miss for miss in misses if miss.figure == check):
            message = _without_controls(f"{miss.sentence}; lost at: {miss.stage}")
            ElementTree.SubElement(case, "failure", message=message, type=miss.figure).text = miss.hint
    return suite


def _checks(results: ValidationResults, rung: Rung) -> Iterator[str]:
    yield "origin"
    if rung.contract is not None:
        yield "contract"
    yield from limits(results.gate, rung)


def _without_controls(text: str) -> str:
    """Replace the control characters that XML cannot represent."""
    return "".join(each if each >= " " or each in "\t\n\r" else "\N{REPLACEMENT CHARACTER}" for each in text)
