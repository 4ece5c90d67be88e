"""Figures in the words, the order and the digits in which llama-perplexity prints them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from edgetune.validation.metrics import Figures, Mean

_Line = tuple[str, Callable[[Figures], str]]


def _six(mean: Mean) -> str:
    return f"{mean.value:10.6f} ± {mean.error:10.6f}"


def _percent(mean: Mean) -> str:
    return f"{100 * mean.value:6.3f} ± {100 * mean.error:5.3f} %"


def _kld(key: str) -> Callable[[Figures], str]:
    return lambda figures: f"{figures.kld_percentiles[key]:10.6f}"


def _delta(key: str) -> Callable[[Figures], str]:
    return lambda figures: f"{100 * figures.delta_p_percentiles[key]:6.3f}%"


PERPLEXITY: tuple[_Line, ...] = (
    ("Mean PPL(Q)                   ", lambda figures: _six(figures.perplexity)),
    ("Mean PPL(base)                ", lambda figures: _six(figures.perplexity_trained)),
    ("Cor(ln(PPL(Q)), ln(PPL(base)))", lambda figures: f"{100 * figures.correlation:6.2f}%"),
    ("Mean ln(PPL(Q)/PPL(base))     ", lambda figures: _six(figures.log_perplexity_ratio)),
    ("Mean PPL(Q)/PPL(base)         ", lambda figures: _six(figures.perplexity_ratio)),
    ("Mean PPL(Q)-PPL(base)         ", lambda figures: _six(figures.perplexity_difference)),
)
DIVERGENCE: tuple[_Line, ...] = (
    ("Mean    KLD", lambda figures: _six(figures.kld)),
    ("Maximum KLD", lambda figures: f"{figures.kld_max:10.6f}"),
    ("99.9%   KLD", _kld("99.9")), ("99.0%   KLD", _kld("99")), ("95.0%   KLD", _kld("95")),
    ("90.0%   KLD", _kld("90")), ("Median  KLD", _kld("50")), ("10.0%   KLD", _kld("10")),
    (" 5.0%   KLD", _kld("5")), (" 1.0%   KLD", _kld("1")),
    (" 0.1%   KLD", _kld("0.1")), ("Minimum KLD", lambda figures: f"{figures.kld_min:10.6f}"),
)  # fmt: skip
PROBABILITY: tuple[_Line, ...] = (
    ("Mean    Δp", lambda figures: _percent(figures.delta_p)),
    ("Maximum Δp", lambda figures: f"{100 * figures.delta_p_max:6.3f}%"),
    ("99.9%   Δp", _delta("99.9")), ("99.0%   Δp", _delta("99")), ("95.0%   Δp", _delta("95")),
    ("90.0%   Δp", _delta("90")), ("75.0%   Δp", _delta("75")), ("Median  Δp", _delta("50")),
    ("25.0%   Δp", _delta("25")), ("10.0%   Δp", _delta("10")), (" 5.0%   Δp", _delta("5")),
    (" 1.0%   Δp", _delta("1")), (" 0.1%   Δp", _delta("0.1")),
    ("Minimum Δp", lambda figures: f"{100 * figures.delta_p_min:6.3f}%"),
    ("RMS Δp    ", lambda figures: _percent(Mean(figures.delta_p_rms, figures.delta_p_rms_error))),
    ("Same top p", lambda figures: _percent(figures.same_top)),
)  # fmt: skip
SECTIONS = {"Perplexity": PERPLEXITY, "KL divergence": DIVERGENCE, "Token probability": PROBABILITY}


def lines(figures: Figures) -> Iterator[str]:
    """One line a statistic; nothing that was not measured."""
    for title, statistics in SECTIONS.items():
        if title == "KL divergence" and math.isnan(figures.kld.value):
            continue
        yield f"====== {title} statistics ======"
        for words, value in statistics:
            yield f"{words}: {value(figures)}"
        yield ""
