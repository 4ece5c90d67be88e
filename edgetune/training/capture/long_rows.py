"""Long rows: RoPE scaling and sliding windows have no effect on short ones, so their faults show only in these."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgetune import console
from edgetune.planning.prepare import PreparedRun
from edgetune.reference.scored_rows import ScoredRows
from edgetune.training.capture import generate
from edgetune.training.capture.forward import repeat_to_length
from edgetune_converters.architectures import ModelConfig

SCORED = 128
"""Number of scored tokens at the end of a long row."""
_BEYOND = 8  # a row beyond the original context is longer by an eighth


def build_reference_rows(prepared: PreparedRun, model: Any) -> tuple[ScoredRows, int]:
    """Return the held-out rows, followed by the long rows of `reference.long`, and the number of long rows."""
    rows = generate.to_scored_rows(prepared.reference_rows)
    if not prepared.config.reference.long:
        return rows, 0
    lengths = choose_long_lengths(
        model.get_base_model().config.get_text_config(), prepared.config.adapter.virtual_tokens
    )
    console.note(f"reference: long rows of {' and '.join(map(str, lengths))} tokens")
    return _append_long_rows(rows, lengths), len(lengths)


def choose_long_lengths(config: Any, taken: int = 0) -> list[int]:
    """Choose lengths in tokens: the original context and, if the model allows more, one beyond it.

    `taken` tokens of the model's context come before every text.
    """
    longest = longest_context(config) - taken
    window = getattr(config, "sliding_window", None)
    original = _scaling(config).get("original_max_position_embeddings") or window or longest
    first = min(int(original), longest)
    beyond = min(first + max(first // _BEYOND, 16), longest)
    return [first, beyond] if beyond > first else [first]


def longest_context(config: Any) -> int:
    """Return the positions that the model is made for, as exported files state them, of a config of transformers."""
    stated = {"max_position_embeddings": 2048, **config.to_dict()}  # BLOOM states none
    return ModelConfig(stated).context


def _scaling(config: Any) -> dict[str, Any]:
    """The RoPE parameters; of a model with two kinds of layers, those of full attention."""
    found: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return found.get("full_attention") or found


def _append_long_rows(rows: ScoredRows, lengths: list[int]) -> ScoredRows:
    """Append rows of these lengths, made of the held-out rows one after the other."""
    each = [ids for ids, _, _ in rows]
    tokens, offsets, positions = [rows.tokens], list(rows.row_offsets), [rows.positions]
    for length in lengths:
        row, scored = repeat_to_length(each, length, SCORED)
        positions.append(scored + offsets[-1])
        offsets.append(offsets[-1] + length)
        tokens.append(row)
    return ScoredRows(np.concatenate(tokens), np.array(offsets), np.concatenate(positions))
