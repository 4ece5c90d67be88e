"""`edgetune validate`: exported files against what the trained model said; exit code 3 when the gate is closed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgetune import console
from edgetune.errors import ConfigError
from edgetune.runs.directory import RunDirectory

if TYPE_CHECKING:
    from edgetune.validation.ladder import Locate
    from edgetune.validation.rungs import Ladder


@click.command(name="validate")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("files", nargs=-1, metavar="FILE...", type=click.Path(path_type=Path))
@click.option(
    "--json",
    "json_",
    type=click.Path(path_type=Path),
    help="Write one validation for all files here. Default: one beside each file.",
)
@click.option("--junit", type=click.Path(path_type=Path), help="Write the checks as JUnit XML, for CI systems.")
@click.option("--html", type=click.Path(path_type=Path), help="Write an HTML page, as `edgetune report` does.")
@click.option(
    "--gate", "gates", multiple=True, metavar="KEY=VALUE", help="Threshold, such as mean_kld_max=0.05 (repeatable)."
)
@click.option("--rows", type=click.IntRange(min=1), help="Use only the first N held-out rows.")
@click.option("--no-task", is_flag=True, help="Skip the task: do not generate answers to the test rows.")
@click.option(
    "--threads", type=click.IntRange(min=1), help="CPU threads. Default: the physical cores (1 for a tiny model)."
)
@click.option(
    "--locate", is_flag=True, help="Find the tensors whose quantization costs most, by restoring them to 16 bits."
)
@click.option(
    "--locate-seconds",
    type=click.FloatRange(min=1),
    default=600,
    show_default=True,
    help="Time limit of --locate for each file.",
)
@click.option("--statistics", is_flag=True, help="Print all statistics in the format of llama-perplexity.")
@click.option(
    "--llama-base", type=click.Path(path_type=Path), metavar="FILE",
    help="Compare with a base file of llama-perplexity --kl-divergence-base instead of a run.",
)  # fmt: skip
def command(
    run: Path,
    files: tuple[Path, ...],
    json_: Path | None,
    junit: Path | None,
    html: Path | None,
    gates: tuple[str, ...],
    rows: int | None,
    no_task: bool,
    threads: int | None,
    locate: bool,
    locate_seconds: float,
    statistics: bool,
    llama_base: Path | None,
) -> None:
    """Measure each FILE against the reference of RUN, token by token, and check the thresholds.

    Thresholds: mean_kld_max, same_top_min, perplexity_ratio_max, recovery_min, task_drop_max, agreement_min,
    long_kld_max. A threshold that --gate does not set is taken from `gate:` in the run's configuration. The exit code
    is 3 if a threshold is missed. Files that are not runnable (receipts, validations, Modelfiles, cards, adapters) are
    skipped if there is a model among the FILEs.

    \b
    Examples:
      edgetune validate runs/mine runs/mine/artifacts/mine-q4_k_m.gguf
      edgetune validate runs/mine mine-f16.gguf mine-q4_k_m.gguf --gate recovery_min=0.95
      edgetune validate --llama-base base.kld mine-q4_k_m.gguf
    """
    if llama_base is not None:
        _against_base_file(llama_base, (run, *files), threads)
        return
    if not files:
        raise click.UsageError("Missing argument 'FILE...'.")
    from edgetune.validation import gate, results
    from edgetune.validation import junit as junit_report
    from edgetune.validation.ladder import Options, climb

    directory = RunDirectory.open(run)
    thresholds = gate.parse(gates, directory.manifest.config)
    files = only_models(files)
    check_distinct(files)
    options = Options(rows, not no_task, threads, locator(directory, locate_seconds) if locate else None)
    ladder = climb(directory, list(files), options, console.count_progress)
    misses = gate.misses(ladder, thresholds)
    if json_ is not None:
        results.write(json_, ladder, ladder.files, thresholds, misses)
    else:
        for rung, file in zip(ladder.files, files, strict=True):
            results.write(results.json_path(file), ladder, [rung], thresholds, misses)
    if junit is not None:
        junit_report.write(junit, ladder, thresholds, misses)
    if html is not None:
        pages = [(results.content(ladder, [rung], thresholds, misses), rung.file) for rung in ladder.files]
        _write_page(html, directory, pages)
    console.stdout().print(results.table(ladder, misses))
    if statistics:
        _print_statistics(ladder)
    if locate:
        _print_located(ladder)
    gate.raise_on(misses)


def _write_page(path: Path, run: RunDirectory, contents: list[tuple[dict[str, Any], Path | None]]) -> None:
    from edgetune.report import gather, page

    page.write(path, gather.material(run, [(content, file.parent) for content, file in contents if file]))


def only_models(files: tuple[Path, ...]) -> tuple[Path, ...]:
    """The files without what lies beside them; as they are where nothing would be left, so that opening says why."""
    from edgetune.runtime.artifacts import select_models

    models, others = select_models(files)
    if models and others:
        kinds = "; ".join(f"{kind} ({', '.join(path.name for path in paths)})" for kind, paths in others.items())
        console.note(f"skipped, being no models that can be run: {kinds}")
    return tuple(models) or files


def check_distinct(files: tuple[Path, ...]) -> None:
    """Rungs go by their file names."""
    names = [file.name for file in files]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ConfigError(f"two files are called {twice}", "Validate them one after the other")


def _print_statistics(ladder: Ladder) -> None:
    from edgetune.validation import llama_perplexity

    for rung in ladder.files:
        click.echo(f"\n{rung.name}")
        click.echo("\n".join(llama_perplexity.lines(rung.figures)))


def locator(run: RunDirectory, seconds: float) -> Locate:
    """Return the function that measures what the quantization of the tensors of a file costs, for --locate."""
    from edgetune.exporting.options import resolve_options
    from edgetune.exporting.request import export_request
    from edgetune.exporting.source import find_source
    from edgetune.sensitivity.gguf import locate

    source = find_source(run.path)
    request = export_request(source, resolve_options(source.export_section, {}))
    return lambda reference, file, progress: locate(request, reference, file, seconds, progress)


def _print_located(ladder: Ladder) -> None:
    """The costliest first; a negative gain is noise, or an error that cancelled another."""
    for rung in ladder.files:
        found = rung.located
        if found is None:
            continue
        end = "" if found.complete else "; there was no time for all"
        click.echo(f"\n{rung.name}: mean KLD {found.kld:.3g}; swapped back to 16 bits{end}:")
        for swap in (*found.kinds, *found.layers):
            share = swap.gain / found.kld if found.kld else 0.0
            click.echo(f"  {swap.tensor:30} {swap.type:12} KLD {swap.kld_without:9.3g}  gain {share:7.1%}")


def _against_base_file(base_file: Path, files: tuple[Path, ...], threads: int | None) -> None:
    """What `llama-perplexity --kl-divergence` prints, for each file."""
    from edgetune.reference.llama_kld import KldBaseFile
    from edgetune.validation import base_file as against
    from edgetune.validation import llama_perplexity

    base = KldBaseFile(base_file)
    for file in files:
        with console.count_progress(file.name) as progress:
            figures = against.measure(base, file, threads, progress)
        click.echo(f"{file.name}: {base.chunks} chunks of {base.context} tokens")
        click.echo("\n".join(llama_perplexity.lines(figures)))
