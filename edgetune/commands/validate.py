"""`edgetune validate`: compare exported files with the trained model; exit code 3 if a threshold is missed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgetune import console
from edgetune.runs.directory import RunDirectory

if TYPE_CHECKING:
    from edgetune.validation.ladder import Ladder
    from edgetune.validation.results import Rung, ValidationResults


@click.command(name="validate")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("files", nargs=-1, metavar="FILE...", type=click.Path(path_type=Path))
@click.option(
    "--json",
    "json_",
    type=click.Path(path_type=Path),
    help="Write one validation for all files here, too; one is written beside each file in any case.",
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
    long_kld_max; of a reward model score_difference_max, pair_flips_max. A threshold that --gate does not set is taken
    from `gate:` in the run's configuration. The exit code is 3 if a threshold is missed; one that is set and was not
    measured (as with --no-task) gives a warning. Files that are not runnable (receipts, validations, Modelfiles, cards,
    adapters) are skipped if there is a model among the FILEs.

    \b
    Examples:
      edgetune validate runs/mine runs/mine/artifacts/mine-q4_k_m.gguf
      edgetune validate runs/mine mine-f16.gguf mine-q4_k_m.gguf --gate recovery_min=0.95
      edgetune validate --llama-base base.kld mine-q4_k_m.gguf
    """
    if llama_base is not None:
        _compare_with_base_file(llama_base, (run, *files), threads)
        return
    if not files:
        raise click.UsageError("Missing argument 'FILE...'.")
    from edgetune.validation import gate, table
    from edgetune.validation.validate import validate_run

    directory = RunDirectory.open(run)
    results = validate_run(
        directory, _runnable(files), gates=gates, rows=rows, with_task=not no_task, threads=threads,
        attach=_locator(directory, locate_seconds) if locate else None, bar=console.count_progress,
    )  # fmt: skip
    _write(results, directory, json_, junit, html)
    console.stdout().print(table.format_table(results))
    for rung in results.files:
        _print_more(rung, statistics)
    for line in gate.unmeasured_warnings(results.unmeasured):
        console.warn(line)
    gate.raise_on(results.misses)


def _runnable(files: tuple[Path, ...]) -> tuple[Path, ...]:
    """Return the models among the files; all files if there is none, so that opening one says why."""
    from edgetune.runtime.artifacts import select_models

    models, others = select_models(files)
    if models and others:
        kinds = "; ".join(f"{kind} ({', '.join(path.name for path in paths)})" for kind, paths in others.items())
        console.note(f"skipped (not runnable): {kinds}")
    return tuple(models) or files


def _locator(run: RunDirectory, seconds: float) -> Callable[[Ladder, Rung], None]:
    """Return the function that adds the costs of its tensors to a quantized GGUF file, for --locate."""
    from edgetune.exporting.options import resolve_options
    from edgetune.exporting.request import export_request
    from edgetune.exporting.source import find_source
    from edgetune.sensitivity.gguf import locate

    source = find_source(run.path)
    request = export_request(source, resolve_options(source.export_section, {}))

    def attach(ladder: Ladder, rung: Rung) -> None:
        if rung.is_quantized and not rung.is_onnx and rung.path is not None:
            with console.count_progress(f"{rung.name}: locate") as progress:
                rung.located = locate(request, ladder.reference, rung.path, seconds, progress)

    return attach


def _write(
    results: ValidationResults, run: RunDirectory, json_: Path | None, junit: Path | None, html: Path | None
) -> None:
    from edgetune.validation.results import results_path

    files = [(results.for_files([rung.name]), rung.path) for rung in results.files if rung.path]
    if json_ is not None:
        results.write(json_)
    for one, file in files:
        try:
            one.write(results_path(file))
        except OSError as error:
            if json_ is None:
                raise
            console.warn(f"{results_path(file)} cannot be written ({error.strerror}); give `edgetune report` {json_}")
    if junit is not None:
        from edgetune.validation.junit import write_junit

        write_junit(junit, results)
    if html is not None:
        from edgetune.report import gather, page

        page.write_page(html, gather.report_data(run, [(each, file.parent) for each, file in files]))


def _print_more(rung: Rung, statistics: bool) -> None:
    from edgetune.validation.llama_perplexity import format_statistics
    from edgetune.validation.table import format_tensor_costs

    if statistics:
        click.echo("\n".join(["", rung.name, *format_statistics(rung.figures)]))
    if rung.located is not None:
        click.echo("\n".join(["", *format_tensor_costs(rung, rung.located)]))


def _compare_with_base_file(base_file: Path, files: tuple[Path, ...], threads: int | None) -> None:
    """Print what `llama-perplexity --kl-divergence` prints, for each file."""
    from edgetune.reference.llama_kld import KldBaseFile
    from edgetune.validation.llama_perplexity import format_statistics, measure_against_base_file

    base = KldBaseFile(base_file)
    for file in files:
        with console.count_progress(file.name) as progress:
            figures = measure_against_base_file(base, file, threads, progress)
        click.echo(f"{file.name}: {base.chunks} chunks of {base.context} tokens")
        click.echo("\n".join(format_statistics(figures)))
