"""The distribution of a file's KL divergences, and the rows where they are largest.

The worst rows are scored a second time, for the most likely tokens of both models at their worst positions, so that
nothing of the size tokens x vocabulary is kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgetune.reference.codecs import F64, I64, largest
from edgetune.reference.scored_rows import ScoredRows
from edgetune.reference.store import Reference
from edgetune.runtime import Runtime
from edgetune.validation.metrics import TokenScores
from edgetune.validation.results import Candidates, Histogram, KldDetail, WorstRow

WORST_ROWS = 6
WINDOW = 200
"""Tokens shown of a longer row, around its worst token."""
POSITIONS = 32
"""Worst tokens of a row whose candidates are kept."""
CANDIDATES = 4

# Four bins per decade, the same for every file, so that histograms can be compared.
_DECADES = (-7, 2)
EDGES = np.logspace(*_DECADES, 4 * (_DECADES[1] - _DECADES[0]) + 1)


@dataclass(frozen=True)
class _Row:
    """One row of the reference with what was measured on it."""

    index: int
    ids: NDArray[np.int32]
    positions: I64
    scored: slice
    kld: F64
    """[len(positions)]"""


def measure_detail(runtime: Runtime, reference: Reference, rows: ScoredRows, scored: TokenScores) -> KldDetail:
    """Describe the divergences of `scored`, the scores of `runtime` on `rows`."""
    return KldDetail(
        kld_histogram=histogram(scored.kld),
        worst_percent_share=worst_percent_share(scored.kld),
        worst_rows=[_worst_row(runtime, reference, scored, row) for row in _worst(rows, scored.kld)],
    )


def histogram(kld: F64) -> Histogram:
    """Count divergences in nats between EDGES; what is outside the edges is in the first or the last bin."""
    inside = np.clip(kld[~np.isnan(kld)], EDGES[0], EDGES[-1])
    counts, _ = np.histogram(inside, EDGES)
    return Histogram(edges=[_rounded(edge) for edge in EDGES], counts=[int(count) for count in counts])


def worst_percent_share(kld: F64) -> float | None:
    """Return the share of all divergence in the worst hundredth of the tokens (at least one); None if all is 0."""
    total = kld.sum()
    if not 0 < total < np.inf:
        return None
    return _rounded(np.sort(kld)[-max(1, len(kld) // 100) :].sum() / total)


def _worst(rows: ScoredRows, kld: F64) -> list[_Row]:
    """Return the rows with the largest mean divergence, the worst first."""
    found = [
        _Row(index, ids, positions, scored, kld[scored])
        for index, (ids, positions, scored) in enumerate(rows)
        if len(positions)
    ]
    return sorted(found, key=lambda row: -float(np.nan_to_num(row.kld).mean()))[:WORST_ROWS]


def _worst_row(runtime: Runtime, reference: Reference, scored: TokenScores, row: _Row) -> WorstRow:
    window = _window(row)
    ids = [int(token) for token in row.ids[window]]
    return WorstRow(
        row=row.index,
        length=len(row.ids),
        mean_kld=_rounded(row.kld.mean()),
        max_kld=_rounded(row.kld.max()),
        first=window.start,
        texts=list(token_texts(runtime, ids)),
        kld=_column(row, window, row.kld),
        p_trained=_column(row, window, np.exp(-reference.trained_nll[row.scored])),
        p_file=_column(row, window, np.exp(-scored.nll[row.scored])),
        candidates=dict(_candidates(runtime, reference, row, window)),
    )


def _window(row: _Row) -> slice:
    """Return at most WINDOW positions around the worst token."""
    middle = int(row.positions[int(np.nan_to_num(row.kld).argmax())])
    start = max(0, min(middle - WINDOW // 2, len(row.ids) - WINDOW))
    return slice(start, min(start + WINDOW, len(row.ids)))


def _column(row: _Row, window: slice, values: F64) -> list[float]:
    by_position = dict(zip(row.positions.tolist(), values.tolist(), strict=True))
    return [_rounded(by_position.get(position, math.nan)) for position in range(window.start, window.stop)]


def _candidates(runtime: Runtime, reference: Reference, row: _Row, window: slice) -> Iterator[tuple[str, Candidates]]:
    """Yield both models' most likely tokens at the worst positions of the window."""
    inside = np.flatnonzero((row.positions >= window.start) & (row.positions < window.stop))
    chosen = np.sort(inside[np.argsort(-row.kld[inside], kind="stable")[:POSITIONS]])
    blocks = runtime.score(row.ids[: row.positions[chosen[-1]] + 1], row.positions[chosen])
    found = itertools.chain.from_iterable(
        zip(*largest(block, CANDIDATES), _totals(block), strict=True) for block in blocks
    )
    for index, (tokens, logits, total) in zip(chosen, found, strict=True):
        at = row.scored.start + int(index)
        theirs, log_probs = reference.most_likely(at, at + 1, CANDIDATES)
        yield (
            str(int(row.positions[index]) - window.start),
            Candidates(
                trained=_with_texts(runtime, theirs[0], np.exp(log_probs[0])),
                file=_with_texts(runtime, tokens, np.exp(logits - total)),
            ),
        )


def _totals(logits: NDArray[np.float32]) -> F64:
    """Return the log-sum-exp of each row: [m]."""
    peak = logits.max(axis=1)
    total = np.log(np.exp(logits - peak[:, None]).sum(axis=1, dtype=np.float64)) + peak
    return np.asarray(total, np.float64)


def _with_texts(runtime: Runtime, ids: I64, probabilities: F64) -> list[tuple[str, float]]:
    pairs = zip(token_texts(runtime, ids.tolist()), probabilities.tolist(), strict=True)
    return [(text, round(probability, 4)) for text, probability in pairs]


def token_texts(runtime: Runtime, ids: list[int]) -> Iterator[str]:
    """Yield the text of each token by itself; bytes that are not a whole character as hexadecimal, as in ⟨E5 8D⟩."""
    for token in ids:
        raw = runtime.token_bytes(token, special=True)
        try:
            yield raw.decode("utf-8")
        except UnicodeDecodeError:
            yield f"⟨{raw.hex(' ').upper()}⟩"


def _rounded(value: float) -> float:
    """Round to three significant figures: the value is for display."""
    return float(f"{float(value):.3g}")
