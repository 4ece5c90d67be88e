"""The mean KL divergence of the logits with one matrix of a model in the coarsest storage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import edgetune_native
from edgetune.reference.codecs import F32
from edgetune.reference.scored_rows import ScoredRows
from edgetune.runtime import Runtime, load
from edgetune.sensitivity.onnx import graphs
from edgetune.validation import scoring


class StoredLogits:
    """The logits [positions, vocabulary] of a model at the scored positions of some rows, stored on disk."""

    def __init__(self, runtime: Runtime, rows: ScoredRows, path: Path) -> None:
        self._rows = rows
        self._logits = np.lib.format.open_memmap(
            path, "w+", np.float32, (len(rows.positions), runtime.vocabulary_size)
        )  # fmt: skip
        for start, logits in _scored(runtime, rows):
            self._logits[start : start + len(logits)] = logits

    def divergence(self, runtime: Runtime) -> float:
        """Return the mean KL divergence of another model from this one, in nats."""
        found = []
        for start, logits in _scored(runtime, self._rows):
            wanted: F32 = np.ascontiguousarray(self._logits[start : start + len(logits)])
            found.append(edgetune_native.compare(wanted, logits, np.zeros(len(logits), np.int32)).kld)
        return float(np.concatenate(found).mean())


def _scored(runtime: Runtime, rows: ScoredRows):  # type: ignore[no-untyped-def]
    done = 0
    for ids, positions, _ in rows:
        for logits in scoring.in_cache(runtime.score(ids, positions)):
            yield done, logits
            done += len(logits)


def measure(
    graph: Path, names: Sequence[str], rows: ScoredRows, place: Path, advance: Callable[[], None]
) -> tuple[list[float], float]:
    """Return the divergence with each named matrix of a switching graph swapped alone, and with all of them.

    Args:
        graph: Written by `graphs.write_switching_graph`.
        names: The matrices, in the order of the graph.
        rows: Held-out rows.
        place: Directory for the logits of the model as it is.
        advance: Called after each matrix.
    """
    with load(graph, context=longest(rows)) as runtime:
        swapped = np.zeros(len(names), bool)
        runtime.bind_input(graphs.SWAPPED, swapped)
        unswapped = StoredLogits(runtime, rows, place / "logits.npy")
        found = []
        for number in range(len(names)):
            swapped[:] = False
            swapped[number] = True
            found.append(unswapped.divergence(runtime))
            advance()
        swapped[:] = True
        return found, unswapped.divergence(runtime)


def longest(rows: ScoredRows) -> int:
    """Return the tokens of the longest row."""
    return int(max(len(ids) for ids, _, _ in rows))
