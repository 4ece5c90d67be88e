"""The held-out rows through a file, token by token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from edgetune.console import Progress
from edgetune.errors import RunDirectoryError
from edgetune.reference.codecs import Comparison
from edgetune.reference.scored_rows import ScoredRows
from edgetune.reference.store import Reference
from edgetune.runtime import Runtime, RuntimeProblem
from edgetune.validation.metrics import TokenScores

_PIECE_BYTES = 2 << 20


def score(runtime: Runtime, reference: Reference, rows: ScoredRows, progress: Progress) -> TokenScores:
    """Compare `runtime` with the reference at the scored tokens of `rows` (the reference's first ones).

    One block of logits exists at a time. RunDirectoryError when the reference is of another vocabulary.
    """
    check_vocabulary(runtime, reference)
    each = list(rows)
    places = [where.start for _, _, where in each]
    found: dict[int, Comparison] = {}
    done = 0
    for row, block in runtime.score_batch([(ids, positions) for ids, positions, _ in each]):
        for logits in in_cache([block]):
            check_finite(runtime, logits, places[row])
            found[places[row]] = reference.compare(places[row], logits, threads=1)
            places[row] += len(logits)
        done += len(block)
        progress(done, len(rows.positions))
    parts = [found[place] for place in sorted(found)]
    return TokenScores(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("kld", "top", "nll")))


def in_cache(blocks: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    """The rows of the blocks in pieces that the processor's cache holds: comparing reads each of them several times.

    A piece is half a millisecond's work, on one thread: waking others takes as long, and longer on a busy machine.
    """
    for block in blocks:
        rows = max(1, _PIECE_BYTES // max(1, block[:1].nbytes))
        for start in range(0, len(block), rows):
            yield block[start : start + rows]


def check_finite(runtime: Runtime, logits: NDArray[np.float32], done: int) -> None:
    """RuntimeProblem for logits [m, V] of which some row has no number to compare."""
    bad = np.flatnonzero(~np.isfinite(logits.max(axis=1)))
    if len(bad):
        raise RuntimeProblem(
            f"the output of {runtime.path} at scored token {done + int(bad[0])} is not a finite number",
            "Its weights are damaged or out of range: export again, with another type if it stays.",
        )


def check_vocabulary(runtime: Runtime, reference: Reference) -> None:
    """A file with another vocabulary was made from another base."""
    if runtime.vocabulary_size != reference.vocab_size:
        raise RunDirectoryError(
            f"{runtime.path} has a vocabulary of {runtime.vocabulary_size} tokens, the reference one of "
            f"{reference.vocab_size}: it was made from another base",
            "Validate a file that was exported from this run.",
        )
