"""`edgetune verify`: check an exported file using only what is embedded in it."""

from __future__ import annotations

from pathlib import Path

import click

from edgetune import console
from edgetune.errors import GateFailure


@click.command(name="verify")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--max-kld",
    type=click.FloatRange(min=0),
    help="Largest KL divergence of the golden first tokens, in nats. Default: depends on the storage type.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="CPU threads. Default: the physical cores (1 for a tiny model)."
)
@click.option("--json", "as_json", is_flag=True, help="Print the checks as JSON.")
def command(file: Path, max_kld: float | None, threads: int | None, as_json: bool) -> None:
    """Verify FILE using only what is embedded in it: hashes, chat template, token ids, stop tokens, golden answers.

    Neither the run directory nor torch is needed. The exit code is 3 if something differs from training. To measure
    the cost of quantization, use `edgetune validate`.

    \b
    Examples:
      edgetune verify mine-q4_k_m.gguf
      edgetune verify mine-int4-onnx/ --max-kld 0.1
    """
    import json
    from dataclasses import asdict

    from edgetune.validation.verify import verify

    with console.count_progress(file.name) as progress:
        found = verify(file, max_kld=max_kld, threads=threads, progress=progress)
    if as_json:
        passed = not found.failed and not found.is_empty
        click.echo(json.dumps({"passed": passed, "checks": [asdict(check) for check in found.checks]}, indent=2))
    else:
        for check in found.checks:
            mark = {True: "ok", False: "FAILED", None: "-"}[check.passed]
            click.echo(f"{mark:8}{check.name:14}{check.detail}")
    if found.failed:
        check = found.failed[0]
        raise GateFailure(f"{file}: {check.name}: {check.detail}", "Fetch the file again, or export it again")
    if found.is_empty:
        raise GateFailure(
            f"{file} has no embedded data to verify it with",
            "Export it with `edgetune merge-export RUN`, or use `edgetune validate`",
        )
