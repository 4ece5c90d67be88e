"""Score the held-out rows with a file, token by token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from edgetune.console import Progress
from edgetune.errors import RunDirectoryError
from edgetune.reference.codecs import StoredComparison
from edgetune.reference.scored_rows import ScoredRows
from edgetune.reference.store import Reference
from edgetune.runtime import Runtime, RuntimeProblem
from edgetune.runtime.hidden_mass import HiddenMass
from edgetune.validation.metrics import TokenScores

_PIECE_BYTES = 2 << 20


def score(
    runtime: Runtime, reference: Reference, rows: ScoredRows, progress: Progress, mass: HiddenMass | None = None
) -> TokenScores:
    """Compare `runtime` with the reference at the scored tokens of `rows`, the reference's first rows.

    One block of logits is in memory at a time. `mass` collects the probability of the rows that a soft prompt adds.

    Raises:
        RunDirectoryError: The reference is of another vocabulary.
        RuntimeProblem: A logit is not a finite number.
    """
    check_vocabulary(runtime, reference)
    each = list(rows)
    places = [where.start for _, _, where in each]
    found: dict[int, StoredComparison] = {}
    done = 0
    for row, block in runtime.score_batch([(ids, positions) for ids, positions, _ in each], mass):
        for logits in in_cache([block]):
            check_finite(runtime, logits, places[row])
            found[places[row]] = reference.compare(places[row], logits, threads=1)
            places[row] += len(logits)
        done += len(block)
        progress(done, len(rows.positions))
    parts = [found[place] for place in sorted(found)]
    return TokenScores(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("kld", "top", "nll")))


def in_cache(blocks: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    """Split blocks into pieces that fit the processor's cache: a comparison reads each piece several times.

    A piece takes half a millisecond on one thread; waking more threads takes as long.
    """
    for block in blocks:
        rows = max(1, _PIECE_BYTES // max(1, block[:1].nbytes))
        for start in range(0, len(block), rows):
            yield block[start : start + rows]


def check_finite(runtime: Runtime, logits: NDArray[np.float32], done: int) -> None:
    """Raise RuntimeProblem if a row of the logits [m, V] has no finite maximum."""
    bad = np.flatnonzero(~np.isfinite(logits.max(axis=1)))
    if len(bad):
        raise RuntimeProblem(
            f"the output of {runtime.path} at scored token {done + int(bad[0])} is not a finite number",
            "Its weights are damaged or out of range: export again, with another storage type if the error remains",
        )


def check_vocabulary(runtime: Runtime, reference: Reference) -> None:
    """Raise RunDirectoryError for another vocabulary: the file was made from another base."""
    if runtime.vocabulary_size != reference.vocab_size:
        raise RunDirectoryError(
            f"{runtime.path} has a vocabulary of {runtime.vocabulary_size} tokens, the reference one of "
            f"{reference.vocab_size}: it was made from another base",
            "Validate a file that was exported from this run",
        )
