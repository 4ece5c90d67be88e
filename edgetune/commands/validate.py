"""`edgetune validate`: exported files against what the trained model said; exit code 3 when the gate is closed."""

from __future__ import annotations

from pathlib import Path

import click

from edgetune import console
from edgetune.errors import ConfigError
from edgetune.run_directory import RunDirectory


@click.command(name="validate", short_help="Prove an exported file against the model as it was trained.")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path))
@click.option("--json", "json_", type=click.Path(path_type=Path), help="One report here, not one beside each file.")
@click.option("--gate", "gates", multiple=True, metavar="KEY=VALUE", help="Threshold, such as mean_kld_max=0.05.")
@click.option("--rows", type=click.IntRange(min=1), help="Only the first so many held-out rows.")
@click.option("--no-task", is_flag=True, help="Do not answer the test rows.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: the physical cores (1 for a tiny model).")
def command(
    run: Path,
    files: tuple[Path, ...],
    json_: Path | None,
    gates: tuple[str, ...],
    rows: int | None,
    no_task: bool,
    threads: int | None,
) -> None:
    """Measure each FILE against the reference of RUN, token by token, and hold it against the thresholds.

    \b
    edgetune validate runs/mine runs/mine/artifacts/mine-q4_k_m.gguf
    edgetune validate runs/mine mine-f16.gguf mine-q4_k_m.gguf --gate recovery_min=0.95

    Thresholds: mean_kld_max, same_top_min, perplexity_ratio_max, recovery_min, task_drop_max; what the run's
    configuration sets under `gate:` holds unless given here. Exit code 3 when one is missed.
    """
    from edgetune.validation import gate, report
    from edgetune.validation.ladder import Options, climb

    directory = RunDirectory.open(run)
    thresholds = gate.parse(gates, directory.manifest["config"])
    check_distinct(files)
    ladder = climb(directory, list(files), Options(rows, not no_task, threads), console.count_progress)
    misses = gate.misses(ladder, thresholds)
    if json_ is not None:
        report.write(json_, ladder, ladder.files, thresholds, misses)
    else:
        for rung, file in zip(ladder.files, files, strict=True):
            report.write(report.json_path(file), ladder, [rung], thresholds, misses)
    console.stdout().print(report.table(ladder, misses))
    gate.raise_on(misses)


def check_distinct(files: tuple[Path, ...]) -> None:
    """Rungs go by their file names."""
    names = [file.name for file in files]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ConfigError(f"two files are called {twice}", "Validate them one after the other.")
