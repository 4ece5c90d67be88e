"""The divergence of a trial export from the trained model, on a part of the held-out rows."""

from __future__ import annotations

from pathlib import Path

from edgetune.reference.codecs import F64
from edgetune.reference.scored_rows import ScoredRows
from edgetune.reference.store import Reference
from edgetune.runtime import load
from edgetune.validation import scoring

TOKENS = 2048
"""Scored tokens on which a trial export is measured, at most."""


def trial_rows(reference: Reference) -> ScoredRows:
    """Return the first held-out rows, up to about TOKENS scored tokens."""
    rows = reference.main_rows
    count = next((index for index, (_, _, where) in enumerate(rows, 1) if where.stop >= TOKENS), len(rows))
    return rows.first(count)


def token_klds(reference: Reference, rows: ScoredRows, file: Path) -> F64:
    """Return the KL divergence [positions] of a file from the trained model at each scored token, in nats."""
    longest = int(max(len(ids) for ids, _, _ in rows))
    with load(file, context=longest) as runtime:
        return scoring.score(runtime, reference, rows, lambda *_: None).kld
