"""How far the logits move when one matrix of a model is stored in the least blocks: the mean KL divergence."""

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


class Told:
    """The logits [P, V] of a model at the scored positions of some rows, on disk."""

    def __init__(self, runtime: Runtime, rows: ScoredRows, path: Path) -> None:
        self._rows = rows
        self._logits = np.lib.format.open_memmap(
            path, "w+", np.float32, (len(rows.positions), runtime.vocabulary_size)
        )  # fmt: skip
        for start, logits in _scored(runtime, rows):
            self._logits[start : start + len(logits)] = logits

    def divergence(self, runtime: Runtime) -> float:
        """The mean KL divergence of another model from this one, in nats."""
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
    """For each of the named matrices of a switching graph the divergence when it alone is swapped, and that of all."""
    with load(graph, context=longest(rows)) as runtime:
        swapped = np.zeros(len(names), bool)
        runtime.bind_input(graphs.SWAPPED, swapped)
        told = Told(runtime, rows, place / "told.npy")
        found = []
        for number in range(len(names)):
            swapped[:] = False
            swapped[number] = True
            found.append(told.divergence(runtime))
            advance()
        swapped[:] = True
        return found, told.divergence(runtime)


def longest(rows: ScoredRows) -> int:
    """Tokens of the longest row."""
    return int(max(len(ids) for ids, _, _ in rows))
