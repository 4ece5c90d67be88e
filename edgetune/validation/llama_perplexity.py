"""llama-perplexity: its statistics in its words, order and digits, and its comparison with a base file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from edgetune.console import Progress
from edgetune.errors import DataError
from edgetune.reference.llama_kld import KldBaseFile, iterate_chunks, scored_positions, with_bos
from edgetune.runtime import Runtime, load
from edgetune.validation.metrics import TokenPairs, figures_of_pairs
from edgetune.validation.results import Figures, Mean
from edgetune.validation.scoring import check_finite, in_cache

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
    ("RMS Δp    ", lambda figures: _percent(Mean(value=figures.delta_p_rms, error=figures.delta_p_rms_error))),
    ("Same top p", lambda figures: _percent(figures.same_top)),
)  # fmt: skip
SECTIONS = {"Perplexity": PERPLEXITY, "KL divergence": DIVERGENCE, "Token probability": PROBABILITY}


def format_statistics(figures: Figures) -> Iterator[str]:
    """Yield one line per statistic that was measured."""
    for title, statistics in SECTIONS.items():
        if title == "KL divergence" and math.isnan(figures.kld.value):
            continue
        yield f"====== {title} statistics ======"
        for words, value in statistics:
            yield f"{words}: {value(figures)}"
        yield ""


def measure_against_base_file(base: KldBaseFile, file: Path, threads: int | None, progress: Progress) -> Figures:
    """Measure an exported file against a base file, as `llama-perplexity --kl-divergence` does, on any runtime.

    Raises:
        DataError: The base file is of another vocabulary.
    """
    with load(file, threads=threads, context=base.context) as runtime:
        if runtime.vocabulary_size != base.vocab_size:
            raise DataError(
                f"{base.path} has a vocabulary of {base.vocab_size} tokens, {file} one of {runtime.vocabulary_size}",
                "Give the base file of the same model",
            )
        return figures_of_pairs(_pairs(base, runtime, progress))


def _pairs(base: KldBaseFile, runtime: Runtime, progress: Progress) -> TokenPairs:
    """Compare block by block, so that one block of logits is in memory at a time.

    The prediction after the last token of a chunk is computed and not used: llama-perplexity feeds whole chunks, and
    with one token less in the batch the products are rounded differently.
    """
    bos, parts = added_bos(runtime), []
    positions = np.append(scored_positions(base.context), base.context)
    for start, chunk in iterate_chunks(base):
        done, end = start, start + base.rows_per_chunk
        for logits in in_cache(runtime.score(with_bos(chunk, bos), positions)):
            known = logits[: end - done]
            if len(known):
                check_finite(runtime, known, done)
                parts.append(base.compare(done, known, threads=1))
            done += len(known)
        progress(done, base.rows)
    names = ("kld", "same_top", "nll", "nll_base")
    return TokenPairs(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def added_bos(runtime: Runtime) -> int | None:
    """Return the BOS token of a vocabulary that adds one to every text, else None."""
    return runtime.bos_token if runtime.tokenize("")[:1] == [runtime.bos_token] else None
