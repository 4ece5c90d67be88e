"""`edgetune doctor`: what this machine can do, and what to do where it cannot."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from edgetune import console

if TYPE_CHECKING:
    from edgetune.inspect.doctor import Finding

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@click.command(name="doctor", short_help="Check this machine: versions, CPU features, GPU, disk.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs and bug reports.")
def command(as_json: bool) -> int:
    """Check this machine: versions, CPU features and kernels, AMX, llama.cpp, ONNX Runtime, GPU, memory, disk.

    Exit code 1 when something essential is broken.
    """
    from edgetune.inspect.doctor import CHECKS, Status

    findings = []
    for check in CHECKS:
        findings.append(check())
        if not as_json:
            show(findings[-1])
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False))
    return int(any(finding.status is Status.FAIL for finding in findings))


def show(finding: Finding) -> None:
    """`ok    cpu           avx512 kernels: ...`, and the hint on a line of its own."""
    from rich.table import Table
    from rich.text import Text

    line = Table.grid(padding=(0, 2, 0, 0))
    for width in (4, 12, None):
        line.add_column(width=width, overflow="fold")
    line.add_row(Text(finding.status, STYLES[finding.status]), finding.name, Text(finding.detail))
    for row in hints(finding):
        line.add_row("", "", Text(row, "italic"))
    console.stdout().print(line)


def hints(finding: Finding) -> Iterable[str]:
    """What to do, if there is something to do."""
    return [finding.hint] if finding.hint else []
