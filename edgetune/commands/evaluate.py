"""`edgetune evaluate`: scores on tasks of lm-evaluation-harness, of a trained model and of its exported files."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgetune import console
from edgetune.errors import ConfigError

if TYPE_CHECKING:
    from edgetune.evaluation.evaluate import OpenModel
    from edgetune.evaluation.models import EvaluatedModel
    from edgetune.runs.directory import RunDirectory


@click.command(name="evaluate")
@click.argument("source", metavar="RUN|FILE", type=click.Path(path_type=Path))
@click.option("--tasks", required=True, metavar="NAME,...", help="Tasks, groups or tags of the harness.")
@click.option(
    "--artifact", "artifacts", multiple=True, metavar="FILE", type=click.Path(path_type=Path),
    help="Exported file of RUN to evaluate beside the trained model (repeatable). Default: all in RUN/artifacts.",
)  # fmt: skip
@click.option(
    "--include-path", "include_paths", multiple=True, metavar="DIR", type=click.Path(path_type=Path),
    help="Folder with tasks of your own (YAML files of the harness; repeatable).",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N documents of each task.")
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Examples in each prompt. Default: as the task says.")
@click.option("--apply-chat-template", is_flag=True, help="Render the prompts with the chat template.")
@click.option(
    "--context", type=click.IntRange(min=8),
    help="Tokens of a prompt and its answer. Default: those of the model, at most 4096.",
)  # fmt: skip
@click.option("--batch-size", type=click.IntRange(min=1), help="Prompts at a time of the trained model.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads for exported files.")
@click.option("--base", type=click.Path(path_type=Path), help="Directory of the base model, if it has moved.")
@click.option("--json", "json_", type=click.Path(path_type=Path), help="Write the results here, too.")
def command(
    source: Path,
    tasks: str,
    artifacts: tuple[Path, ...],
    include_paths: tuple[Path, ...],
    limit: int | None,
    num_fewshot: int | None,
    apply_chat_template: bool,
    context: int | None,
    batch_size: int | None,
    threads: int | None,
    base: Path | None,
    json_: Path | None,
) -> None:
    """Evaluate RUN or FILE on tasks of lm-evaluation-harness (the extra `evaluate`).

    RUN evaluates the trained model (the extra `train`) and its exported files with the very same prompts, and shows
    the differences. The results are stored in RUN/evaluations; `report` and `card` show them. FILE evaluates one
    exported file on the CPU, without torch.

    \b
    Examples:
      edgetune evaluate runs/mine --tasks arc_easy,hellaswag --limit 200
      edgetune evaluate runs/mine --artifact runs/mine/artifacts/mine-q4_k_m.gguf --tasks mmlu --num-fewshot 5
      edgetune evaluate mine-q4_k_m.gguf --tasks my_task --include-path my_tasks --apply-chat-template
    """
    from edgetune.evaluation import evaluate, table
    from edgetune.evaluation.results import remarks, stored_path
    from edgetune.evaluation.tasks import require_harness
    from edgetune.runs.directory import RunDirectory

    require_harness()
    names = tuple(name for name in (each.strip() for each in tasks.split(",")) if name)
    if not names:
        raise ConfigError(f"--tasks {tasks!r} names no task", "Name some, such as --tasks arc_easy,hellaswag")
    run = RunDirectory.open(source) if RunDirectory(source).manifest_file.is_file() else None
    models: dict[str, OpenModel]
    if run is not None:
        models = _models_of_run(run, artifacts, batch_size, threads, base)
    else:
        _refuse_options_of_runs(source, artifacts, batch_size, base)
        models = {source.name: evaluate.file_opener(source, threads)}
    request = evaluate.EvaluationRequest(names, include_paths, limit, num_fewshot, apply_chat_template, context, models)
    results = evaluate.evaluate_models(request, run.path.resolve().name if run else "")
    for path in ([stored_path(run, results)] if run else []) + ([json_] if json_ else []):
        results.write(path)
    console.stdout().print(table.format_table(results))
    for line in remarks(results):
        console.warn(line)


def _models_of_run(
    run: RunDirectory, artifacts: tuple[Path, ...], batch_size: int | None, threads: int | None, base: Path | None
) -> dict[str, OpenModel]:
    """Return how the trained model and its files are opened."""
    from edgetune.evaluation.evaluate import file_opener
    from edgetune.evaluation.results import TRAINED
    from edgetune.runtime.artifacts import is_model, select_models
    from edgetune.training import environment

    if run.score_head.is_file():
        raise ConfigError(
            f"{run.path} trained a reward model, which gives scores: tasks of the harness need a language model",
            f"`edgetune validate {run.path} FILE` compares the scores of its files with the trained ones",
        )
    environment.require_train_extra()
    files = artifacts or tuple(
        path for path in select_models(sorted(run.artifacts.glob("*")))[0] if is_model(path)
    )  # fmt: skip
    if not files:
        console.note(f"no exported file in {run.artifacts}: the trained model alone is evaluated")

    def open_model(context: int | None) -> AbstractContextManager[EvaluatedModel]:
        with environment.silence_libraries():
            from edgetune.training.evaluated_model import open_trained
        return open_trained(run, context, batch_size, base)

    models: dict[str, OpenModel] = {TRAINED: open_model}
    for file in files:
        if file.name in models:
            raise ConfigError(f"two of the files are called {file.name}", "Rename one, or evaluate it separately")
        models[file.name] = file_opener(file, threads, run)
    return models


def _refuse_options_of_runs(
    source: Path, artifacts: tuple[Path, ...], batch_size: int | None, base: Path | None
) -> None:
    given = {"--artifact": bool(artifacts), "--batch-size": batch_size is not None, "--base": base is not None}
    for option, is_given in given.items():
        if is_given:
            raise ConfigError(
                f"{option} applies to a run, and {source} is not a run directory",
                f"Leave it out, or give the run directory instead of {source}",
            )
