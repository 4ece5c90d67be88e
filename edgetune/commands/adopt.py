"""`edgetune adopt`: a run directory around an adapter that another program trained."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from edgetune import console

RESUME = "Resume an unfinished adoption of the same inputs."
OVERWRITE = "Replace an existing run."
DRY_RUN = "Check adapter, base, rows and export; load no weights and write nothing."


@click.command(name="adopt")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option(
    "--base", required=True,
    help="Model that the adapter was trained on: a directory, a GGUF file, or a name on the Hugging Face hub.",
)  # fmt: skip
@click.option("--data", required=True, metavar="ROWS", help="Held-out rows, in any format of data.validation.")
@click.option("--test", metavar="ROWS", help="Rows with a checkable answer, as data.test.")
@click.option(
    "--arguments", type=click.Path(path_type=Path), metavar="FILE",
    help="YAML or JSON file of the training, if it does not lie beside the adapter.",
)  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Run directory. Default: runs/NAME.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Set an option of the configuration (repeatable)."
)
@click.option("--resume", is_flag=True, help=RESUME)
@click.option("--overwrite", is_flag=True, help=OVERWRITE)
@click.option("--dry-run", is_flag=True, help=DRY_RUN)
def command(
    adapter: Path,
    base: str,
    data: str,
    test: str | None,
    arguments: Path | None,
    output: Path | None,
    overrides: tuple[str, ...],
    resume: bool,
    overwrite: bool,
    dry_run: bool,
) -> None:
    """Make a run directory around ADAPTER, which PEFT, Axolotl, LLaMA-Factory, ms-swift, Unsloth or MLX trained.

    The arguments of the training are read from the files beside the adapter. Its reference outputs are captured on
    held-out rows, as after a training; then merge-export, validate and report work as for any run.

    \b
    Examples:
      edgetune adopt outputs/lora --base models/Qwen2.5-0.5B --data held-out.jsonl --dry-run
      edgetune adopt outputs/lora --base models/Qwen2.5-0.5B --data held-out.jsonl -o runs/adopted
      edgetune adopt outputs/checkpoint-500 --base ORG/NAME --data rows.jsonl --arguments axolotl.yaml
    """
    from edgetune.adoption.request import AdoptionRequest
    from edgetune.training import adopt as adoption

    request = AdoptionRequest(adapter, base, data, test, arguments, overrides)
    if dry_run:
        adoption.dry_run(request, output, resume=resume, overwrite=overwrite)
        return
    try:
        run = adoption.adopt(request, output, resume=resume, overwrite=overwrite)
    except KeyboardInterrupt:
        words = ["edgetune", "adopt", str(adapter), "--base", base, "--data", data]
        console.note(f"stopped; resume with `{shlex.join(words)} ... --resume`")
        click.get_current_context().exit(130)
    click.echo(adoption.format_summary(run))
