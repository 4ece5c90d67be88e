"""Rows that show long contexts: RoPE scaling and sliding windows do nothing to short ones (DESIGN 7.10)."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgetune import console
from edgetune.planning.prepare import PreparedRun
from edgetune.reference.scored_rows import ScoredRows
from edgetune.training.capture import generate
from edgetune.training.capture.forward import repeat_to_length

SCORED = 128
"""Tokens at the end of a long row that are scored."""
_BEYOND = 8
"""A row past a length is longer by one part in so many."""


def build_reference_rows(plan: PreparedRun, model: Any) -> tuple[ScoredRows, int]:
    """The held-out rows, and after them the long ones that `reference.long` asks for; how many these are."""
    rows = generate.to_scored_rows(plan.reference_rows)
    if not plan.config.reference.long:
        return rows, 0
    lengths = choose_long_lengths(model.get_base_model().config.get_text_config())
    console.note(f"reference: long rows of {' and '.join(map(str, lengths))} tokens")
    return _appended(rows, lengths), len(lengths)


def choose_long_lengths(config: Any) -> list[int]:
    """Lengths in tokens: up to where the model was first made for, and past that where it allows more."""
    most = int(config.max_position_embeddings)
    scaling = getattr(config, "rope_parameters", None) or {}
    window = getattr(config, "sliding_window", None)
    original = scaling.get("original_max_position_embeddings") or window or most
    first = min(int(original), most)
    beyond = min(first + max(first // _BEYOND, 16), most)
    return [first, beyond] if beyond > first else [first]


def _appended(rows: ScoredRows, lengths: list[int]) -> ScoredRows:
    """The held-out rows again, one after the other, as rows of these lengths."""
    each = [ids for ids, _, _ in rows]
    tokens, offsets, positions = [rows.tokens], list(rows.row_offsets), [rows.positions]
    for length in lengths:
        row, scored = repeat_to_length(each, length, SCORED)
        positions.append(scored + offsets[-1])
        offsets.append(offsets[-1] + length)
        tokens.append(row)
    return ScoredRows(np.concatenate(tokens), np.array(offsets), np.concatenate(positions))
