"""The results of a validation as a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgetune.validation.meaning import describe_hidden
from edgetune.validation.numbers import NOTHING, share, short, with_error
from edgetune.validation.results import TRAINED, Contract, Rung, TensorCosts, ValidationResults
from edgetune.validation.scores import describe_scores

_NAME_WIDTH = 24


def format_table(results: ValidationResults) -> RenderableType:
    """Return the ladder, at most 100 characters wide, and remarks on it."""
    at_least = "≥ " if results.reference.kld_is_lower_bound else ""
    columns: list[tuple[str, Callable[[Rung], str]]] = [
        ("MB", lambda rung: f"{rung.size / 1e6:.1f}" if rung.size else ""),
        ("CE", lambda rung: f"{rung.figures.cross_entropy.value:.4f}"),
        ("PPL", lambda rung: short(rung.figures.perplexity.value, 4, plain=True)),
        ("mean KLD", lambda rung: _kld(rung, at_least)),
        ("p99", lambda rung: short(rung.figures.kld_percentiles["99"], plain=True)),
        ("same top", lambda rung: share(rung.figures.same_top.value, plain=True)),
        ("recovery", lambda rung: NOTHING if rung.figures.recovery is None else f"{rung.figures.recovery:.4f}"),
        ("task", lambda rung: NOTHING if rung.task is None else share(rung.task.share, plain=True)),
    ]
    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    grid.add_column("", no_wrap=True)
    for title, _ in columns:
        grid.add_column(title, justify="right", no_wrap=True)
    missed = {miss.rung for miss in results.misses}
    for rung in results.rungs:
        style = "red" if rung.name in missed else "dim" if not rung.file else "green" if results.is_judged else ""
        grid.add_row(Text(_name(rung), style=style), *(cell(rung) for _, cell in columns))
    return Group(grid, *(Text(line, style="dim") for line in ["", *_remarks(results)]))


def _remarks(results: ValidationResults) -> Iterator[str]:
    reference, trained = results.reference, results.rung(TRAINED)
    assert trained is not None
    bound = "; KLD is a lower bound (top-k reference)" if reference.kld_is_lower_bound else ""
    yield (
        f"{reference.rows} rows, {reference.tokens} tokens; KLD in nats per token ± standard error; "
        f"coding floor {short(trained.figures.kld.value, plain=True)}{bound}"
    )
    if reference.caution:
        yield f"{reference.caution}; to capture more rows: edgetune reference RUN --rows FILE"
    if trained.figures.recovery is None and not any(rung.meaning for rung in results.files):
        yield "recovery is not defined: training gained nothing on these rows"
    yield from (f"{_name(rung)}: {_contract(rung.contract)}" for rung in results.files if rung.contract)
    yield from (f"{_name(rung)}: {describe_scores(rung.scores)}" for rung in results.files if rung.scores)
    yield from (f"{_name(rung)}: {describe_hidden(rung.hidden, plain=True)}" for rung in results.files if rung.hidden)
    yield from (f"{_name(rung)}: {note}" for rung in results.files for note in rung.notes)
    yield from _meanings(results)
    if not results.is_judged:
        yield "no threshold is set: only contract and origin were checked (--gate KEY=VALUE sets one)"
    for rung in results.files:
        if rung.task and rung.task.first_miss:
            prompt, got = (_shorten(rung.task.first_miss[key]) for key in ("prompt", "got"))
            yield f"{_name(rung)}: first answer lost: prompt {prompt}, answer {got}"


def _meanings(results: ValidationResults) -> Iterator[str]:
    """Yield what the figures mean; a sentence that is true of several files once."""
    files: dict[str, list[str]] = {}
    for rung in results.files:
        for sentence in rung.meaning:
            files.setdefault(sentence, []).append(_name(rung))
    yield from (f"{', '.join(names)}: {sentence}" for sentence, names in files.items())


def format_tensor_costs(rung: Rung, costs: TensorCosts) -> Iterator[str]:
    """Yield one line per swap, the worst first; a negative gain is noise, or an error that canceled another."""
    end = "" if costs.complete else "; the time was not enough for all"
    yield f"{rung.name}: mean KLD {costs.kld:.3g}; effect of 16 bits instead{end}:"
    for swap in (*costs.kinds, *costs.layers):
        gain = swap.gain / costs.kld if costs.kld else 0.0
        yield f"  {swap.tensor:30} {swap.type:12} KLD {swap.kld_without:9.3g}  gain {gain:7.1%}"


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 40 else text[:39] + "…")


def _name(rung: Rung) -> str:
    """Return the end of the name, which holds the storage type."""
    name = rung.name.removesuffix(".gguf")
    return name if len(name) <= _NAME_WIDTH else "…" + name[1 - _NAME_WIDTH :]


def _contract(contract: Contract) -> str:
    if contract.holds:
        return f"contract holds: template, token ids, BOS and stops in {contract.conversations} conversations"
    return f"contract broken: {', '.join(difference.what for difference in contract.differences)}"


def _kld(rung: Rung, prefix: str) -> str:
    text = with_error(rung.figures.kld, plain=True)
    return text if text == NOTHING else prefix + text
