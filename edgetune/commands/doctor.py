"""`edgetune doctor`: what this machine can do, and what to do where it cannot."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from edgetune import console

if TYPE_CHECKING:
    from edgetune.inspect.doctor import Finding

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
WIDTHS = (4, 12, None)  # status, name, detail


@click.command(name="doctor")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON, for programs and bug reports.")
def command(as_json: bool) -> int:
    """Check this machine: versions, CPU features and kernels, AMX, llama.cpp, ONNX Runtime, GPU, memory, disk.

    The exit code is 1 if something essential is broken.

    \b
    Example:
      edgetune doctor --json > doctor.json
    """
    from edgetune.inspect.doctor import CHECKS, Status

    findings = []
    for check in CHECKS:
        findings.append(check())
        if not as_json:
            print_finding(findings[-1])
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False))
    return int(any(finding.status is Status.FAIL for finding in findings))


def print_finding(finding: Finding) -> None:
    """Print `ok    cpu           avx512 kernels: ...`, and the hint on a line of its own."""
    from rich.text import Text

    rows = [[Text(finding.status, STYLES[finding.status]), Text(finding.name), Text(finding.detail)]]
    if finding.hint:
        rows.append([Text(), Text(), Text(console.end_sentence(finding.hint), "italic")])
    console.print_columns(rows, WIDTHS)
