"""`edgetune bench`: measure the speed of an exported file on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from typing_extensions import override

if TYPE_CHECKING:
    from edgetune.benchmarking.results import BenchResults
    from edgetune.benchmarking.speeds import BenchModel, BenchPlan


class _Counts(click.ParamType[tuple[int, ...]]):
    """Numbers with commas between them."""

    name = "N[,N...]"

    def __init__(self, least: int, most: int) -> None:
        self._range = click.IntRange(least, most)

    @override
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(self._range.convert(part.strip(), param, ctx) for part in value.split(","))


_TOKENS = _Counts(0, 1 << 20)


@click.command(name="bench")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-p",
    "--prompt-tokens",
    "prompts",
    type=_TOKENS,
    help="Lengths of prompts to evaluate; 0 measures none. Default: 512, less if the model was made for less.",
)
@click.option(
    "-n",
    "--answer-tokens",
    "answers",
    type=_TOKENS,
    help="Lengths of answers to generate; 0 measures none. Default: 128, less if the model was made for less.",
)
@click.option(
    "--streams",
    type=_Counts(0, 256),
    default="1,4,8,32",
    show_default=True,
    help="Numbers of answers that are generated at the same time; 0 measures none.",
)
@click.option(
    "-r",
    "--rounds",
    type=click.IntRange(1, 1000),
    default=5,
    show_default=True,
    help="Rounds of each measurement, after one that is not counted.",
)
@click.option(
    "-t", "--threads", type=_Counts(1, 1024), help="CPU threads. Default: the physical cores (1 for a tiny model)."
)
@click.option("--no-fit", is_flag=True, help="Do not use the settings that `edgetune fit` remembered for the file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def command(
    file: Path,
    prompts: tuple[int, ...] | None,
    answers: tuple[int, ...] | None,
    streams: tuple[int, ...],
    rounds: int,
    threads: tuple[int, ...] | None,
    no_fit: bool,
    as_json: bool,
) -> None:
    """Measure the speed of FILE on this machine: prompts, answers, parallel streams, memory bandwidth.

    pp512 and tg128 are those of llama-bench: tokens per second of a prompt of 512 tokens, and of 128 further tokens.
    The settings are those that `edgetune fit` remembered, as in `run`, `chat` and `serve`, or else the defaults.
    The weights that decoding reads each second are compared with what the same threads read from memory.

    \b
    Examples:
      edgetune bench model.gguf
      edgetune bench model.gguf -p 128,512 -n 0 --streams 0 -t 1,2
      edgetune bench model.gguf --json > speed.json
    """
    from edgetune.benchmarking.speeds import BenchPlan, check_plan, read_facts
    from edgetune.runtime.machine_fit import find_fit

    if all(given is not None and not any(given) for given in (prompts, answers, streams)):
        raise click.UsageError("There is nothing to measure: -p, -n and --streams are 0.")
    fit = None if no_fit else find_fit(file)
    model = read_facts(file, fit)
    plan = BenchPlan(
        _distinct(prompts or (min(512, model.longest),)), _distinct(answers or (min(128, model.longest),)),
        _distinct(streams), tuple(dict.fromkeys(threads or (model.threads,))), rounds, fit,
    )  # fmt: skip
    check_plan(file, plan, model)
    results = _measure(file, plan, model)
    click.echo(json.dumps(results.to_json(), indent=2) if as_json else results.table())


def _distinct(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Return each number once, without 0."""
    return tuple(dict.fromkeys(filter(None, numbers)))


def _measure(file: Path, plan: BenchPlan, model: BenchModel) -> BenchResults:
    from edgetune import console
    from edgetune.benchmarking import memory
    from edgetune.benchmarking.results import BenchResults, runtime_versions
    from edgetune.benchmarking.speeds import measure_speeds

    speeds = []
    with console.count_progress(f"measuring {file.name}", announce=True) as update:
        update(0, plan.count)
        before = {count: memory.measure_memory(count) for count in plan.threads}
        for speed in measure_speeds(file, plan):
            speeds.append(speed)
            update(len(speeds), plan.count)
        bandwidths = {count: before[count].best(memory.measure_memory(count)) for count in plan.threads}
    return BenchResults(
        file, model.format, model.size, memory.bytes_per_token(file), runtime_versions(model.format),
        memory.processor_name(), memory.cache_size(), bandwidths, speeds,
        plan.fit.describe() if plan.fit else None,
    )  # fmt: skip
