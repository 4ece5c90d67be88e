"""`edgetune verify`: is this file whole, and is it what was trained? On any machine, from the file alone."""

from __future__ import annotations

from pathlib import Path

import click

from edgetune import console
from edgetune.errors import GateFailure


@click.command(name="verify", short_help="Check an exported file from itself alone, on the machine where it will run.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--max-kld", type=click.FloatRange(min=0), help="For the golden answers' first tokens. Default: by the type."
)
@click.option("--threads", type=click.IntRange(min=1), help="Default: the physical cores (1 for a tiny model).")
@click.option("--json", "as_json", is_flag=True, help="Print the checks as JSON.")
def command(file: Path, max_kld: float | None, threads: int | None, as_json: bool) -> None:
    """Check FILE with what it carries: hashes, template, token ids, stop tokens, the first tokens of golden answers.

    \b
    edgetune verify mine-q4_k_m.gguf
    edgetune verify mine-int4/ --max-kld 0.1

    Neither the run directory nor torch is needed. Exit code 3 when something differs from training. How much
    quantization cost is measured by `edgetune validate`.
    """
    import json
    from dataclasses import asdict

    from edgetune.validation.verify import verify

    with console.count_progress(file.name) as progress:
        verdict = verify(file, max_kld=max_kld, threads=threads, progress=progress)
    if as_json:
        passed = not verdict.failed and not verdict.is_empty
        click.echo(json.dumps({"passed": passed, "checks": [asdict(check) for check in verdict.checks]}, indent=2))
    else:
        for check in verdict.checks:
            mark = {True: "ok", False: "FAILED", None: "-"}[check.passed]
            click.echo(f"{mark:8}{check.name:14}{check.detail}")
    if verdict.failed:
        check = verdict.failed[0]
        raise GateFailure(f"{file}: {check.name}: {check.detail}", "Fetch the file again, or export it again.")
    if verdict.is_empty:
        raise GateFailure(
            f"{file} carries nothing to verify it with", "Export it with `edgetune merge-export RUN`, or use validate."
        )
