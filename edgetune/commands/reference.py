"""`edgetune reference`: recapture the reference outputs: other rows, full vocabulary, merged model, llama.cpp."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgetune.errors import ConfigError
from edgetune.runs import lock
from edgetune.runs.directory import RunDirectory
from edgetune_converters.names import MERGE_BASES

if TYPE_CHECKING:
    from edgetune_converters.request import ExportRequest


@click.command(name="reference")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--rows", type=click.Path(path_type=Path), help="Held-out rows to use instead of the run's data.validation."
)
@click.option(
    "--count", type=click.IntRange(min=1), help="Number of held-out rows. Default: reference.rows of the run."
)
@click.option("--full-vocab", is_flag=True, help="Store the log-probabilities of the full vocabulary.")
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    help="Store the K largest log-probabilities per token; the rest as one bucket.",
)
@click.option("--long", "long_", is_flag=True, help="Add rows as long as the original context and longer.")
@click.option(
    "--merged", type=click.Choice(MERGE_BASES), multiple=True,
    help="Also measure the merged, unquantized model: merged into the original base or into the NF4 base.",
)  # fmt: skip
@click.option(
    "--llama-kld", type=click.Path(path_type=Path), metavar="FILE",
    help="Write a base file for llama-perplexity --kl-divergence-base.",
)  # fmt: skip
@click.option(
    "--llama-context",
    type=click.IntRange(min=8),
    default=512,
    show_default=True,
    help="Tokens per chunk of --llama-kld.",
)
@click.option("--llama-text", type=click.Path(path_type=Path), help="Text for --llama-kld. Default: the held-out rows.")
@click.option("--base", type=click.Path(path_type=Path), help="Directory of the base model, if it has moved.")
def command(
    run: Path,
    rows: Path | None,
    count: int | None,
    full_vocab: bool,
    top_k: int | None,
    long_: bool,
    merged: tuple[str, ...],
    llama_kld: Path | None,
    llama_context: int,
    llama_text: Path | None,
    base: Path | None,
) -> None:
    """Recapture the reference outputs of RUN: log-probabilities and greedy answers, against which files are validated.

    It runs on a GPU or on the CPU, and needs the training extra. An interrupted capture resumes. With only --merged or
    --llama-kld, the stored reference stays as it is.

    \b
    Examples:
      edgetune reference runs/mine --rows more.jsonl --count 500
      edgetune reference runs/mine --full-vocab --long
      edgetune reference runs/mine --merged original --merged nf4
      edgetune reference runs/mine --llama-kld base.kld --llama-text wiki.txt
    """
    if full_vocab and top_k:
        raise ConfigError("--full-vocab and --top-k were both given", "Give one of them")
    if llama_text and not llama_kld:
        raise ConfigError("--llama-text was given without --llama-kld", "Name the file to write with --llama-kld FILE")
    directory = RunDirectory.open(run)
    changed = bool(rows or count or full_vocab or top_k or long_)
    config = _config(directory, rows, {"rows": count, **_coding(full_vocab, top_k), "long": long_ or None}, base)
    from edgetune.training import environment

    environment.require_train_extra()
    with environment.silence_libraries():
        from edgetune.training.capture.recapture import RecaptureRequest, recapture

        captures_reference = changed or not (merged or llama_kld)
        with lock.writing(run, "`edgetune reference`") if captures_reference or merged else nullcontext():
            requests = _merge_requests(run, base, merged)
            request = RecaptureRequest(captures_reference, requests, llama_kld, llama_context, llama_text)
            recapture(directory, config, request)


def _merge_requests(run: Path, base: Path | None, names: tuple[str, ...]) -> dict[str, ExportRequest]:
    """Return the request for each merged model; its target is chosen where it is written."""
    if not names:
        return {}
    from edgetune.config import ExportConfig
    from edgetune.exporting.request import export_request
    from edgetune.exporting.source import find_source

    request = export_request(find_source(run, base), ExportConfig())
    return {name: replace(request, merge_base=name) for name in MERGE_BASES if name in names}


def _coding(full_vocab: bool, top_k: int | None) -> dict[str, int | None]:
    if full_vocab:
        return {"full_vocabulary_limit": 2**31}
    return {"full_vocabulary_limit": 0, "top_k": top_k} if top_k else {}


def _config(run: RunDirectory, rows: Path | None, reference: dict[str, Any], base: Path | None) -> Any:
    """Return the run's configuration with the options applied."""
    from edgetune.config import parse_config

    stored = run.config_here(base)
    data = {**stored["data"], **({"validation": str(rows.resolve())} if rows else {})}
    given = {key: value for key, value in reference.items() if value is not None}
    changes = {"data": data, "reference": {**stored["reference"], **given}}
    return parse_config({**stored, **changes}, str(run.manifest_file))
