"""`edgetune fit`: measure how a file runs fastest on this machine, and remember it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgetune import console

if TYPE_CHECKING:
    from edgetune.runtime.probing import Trial

COLUMNS = ("setting", "prompt", "answer", "request", "load", "")


@click.command(name="fit")
@click.argument("file", type=click.Path(path_type=Path))
def command(file: Path) -> None:
    """Measure how FILE runs fastest on this machine, and remember it for run, chat and serve.

    Threads, repacking, flash attention, batch size and memory mapping are tried, for half a minute or more. None of
    them changes answers, except where two tokens are nearly equally likely. A quantized cache would, and is measured
    for information. Other programs should be idle meanwhile.

    \b
    Example:
      edgetune fit model.gguf
    """
    from rich.table import Table

    from edgetune.runtime.loading import require_file
    from edgetune.runtime.machine_fit import remember_fit
    from edgetune.runtime.probing import ANSWER, PROMPT, measure_costs, probe
    from edgetune.runtime.threads import ProcessorTime, physical_cores

    require_file(file)
    if not ProcessorTime.now().leaves_idle(physical_cores()):
        console.warn("other processes use the CPU now, and the figures vary with them; measure again when it is idle")
    with console.count_progress(f"fitting {file.name}", announce=True) as update:
        trials = list(probe(file, update))
        best = [trial for trial in trials if trial.is_chosen][-1]
        fit = measure_costs(file, best.fit)
    title = f"{file.name}: tokens/s, and seconds of a request of {PROMPT} and {ANSWER} tokens"
    table = Table(*COLUMNS, title=title, box=None, title_justify="left")
    for trial in trials:
        table.add_row(*_cells(trial))
    console.print_table(table)
    if fit.costs:
        rows = ", ".join(f"{cost:.2f}" for cost in fit.costs)
        click.echo(f"batches of 1, 2, 4, 8, 16 and 32 rows take {rows} of the time of one row")
    click.echo(f"best: {fit.describe()}")
    try:
        console.note(f"remembered in {remember_fit(file, fit)}; run, chat and serve use it (--no-fit does not)")
    except OSError as error:
        console.warn(f"it is not remembered: {error}")


def _cells(trial: Trial) -> tuple[str, ...]:
    speed, rival = trial.speed, trial.rival
    if speed is None:
        return trial.setting, "", "", "", "", "refused for this model"
    gain = rival.seconds / speed.seconds
    rates = (f"{speed.prompt:.1f}", f"{speed.answer:.1f}", f"{speed.seconds:.2f}", f"{speed.load:.2f} s")
    if not trial.fit.maps_file and rival.load:
        opening = f"opens in {speed.load / rival.load:.2f} of the time"
        return trial.setting, *rates, f"{opening}: {'chosen' if trial.is_chosen else 'not worth memory of its own'}"
    reason = "chosen" if trial.is_chosen else "not faster by 3 %" if trial.is_choice else "changes answers, not chosen"
    verdict = "start" if trial.setting == "defaults" else f"{gain:.2f}x of the best so far: {reason}"
    return trial.setting, *rates, verdict
