"""Logits of held-out rows in batches: one pass through the network, then its head over a few positions at a time.

The rows of a batch are padded on the right, where a causal model does not look. Therefore the logits are those of each
row alone, apart from the rounding of matrix products of another shape. However large the vocabulary, at most
BLOCK_BYTES of logits are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgetune.reference.scored_rows import ScoredRows
from edgetune.training.adapters.virtual_tokens import embed

BLOCK_BYTES = 128 * 2**20
BATCH_TOKENS = {"cuda": 8192, "cpu": 1024}
"""Largest number of tokens of a batch, padding included."""

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Batch:
    """Consecutive rows: the token ids of each, and the scored positions within each."""

    ids: list[NDArray[np.int32]]
    scored: list[NDArray[np.int64]]

    @property
    def targets(self) -> NDArray[np.int32]:
        """The scored tokens int32 [m], row after row."""
        return np.concatenate([ids[scored] for ids, scored in zip(self.ids, self.scored, strict=True)])


def make_batches(rows: ScoredRows, tokens: int, done: int = 0) -> Iterator[Batch]:
    """Yield the rows in order, in batches of at most `tokens` tokens; a longer row is a batch of its own.

    Rows whose scored positions are all among the first `done` are left out.
    """
    ids: list[NDArray[np.int32]] = []
    scored: list[NDArray[np.int64]] = []
    longest = 0
    for row, positions, where in rows:
        if where.stop <= done:
            continue
        if ids and max(longest, len(row)) * (len(ids) + 1) > tokens:
            yield Batch(ids, scored)
            ids, scored, longest = [], [], 0
        ids, scored, longest = [*ids, row], [*scored, positions], max(longest, len(row))
    if ids:
        yield Batch(ids, scored)


def compute_logits(model: Any, batch: Batch) -> Iterator[F32]:
    """Yield blocks of logits f32 [m, vocabulary] that predict the scored positions, row after row."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    padded = np.zeros((len(batch.ids), max(map(len, batch.ids))), np.int64)
    for row, ids in enumerate(batch.ids):
        padded[row, : len(ids)] = ids
    inputs, first = embed(model, torch.from_numpy(padded).to(model.device))
    hidden = causal.base_model(**inputs, use_cache=False)
    size = max(1, BLOCK_BYTES // (4 * causal.config.get_text_config().vocab_size))
    for row, scored in enumerate(batch.scored):
        predictors = torch.from_numpy(scored - 1 + first).to(model.device)
        for block in torch.split(predictors, size):
            output = type(hidden)(**{**hidden, "last_hidden_state": hidden[0][row : row + 1, block]})
            yield _apply_head(causal, output, len(block)).float().cpu().numpy()


def _apply_head(causal: Any, output: Any, count: int) -> torch.Tensor:
    """Return logits [count, vocabulary] of the network's output, with the model's caps and scales after the head."""
    with _fixed_output(causal.base_model, output):
        logits: torch.Tensor = causal(input_ids=torch.zeros((1, count), dtype=torch.long), use_cache=False).logits
    return logits[0]


@contextmanager
def _fixed_output(network: Any, output: Any) -> Iterator[None]:
    """Replace the forward of the network, so that it returns this output."""
    before = network.__dict__.get("forward")
    network.forward = lambda *_, **__: output
    try:
        yield
    finally:
        if before is None:
            del network.forward
        else:
            network.forward = before


def batches_for_device(model: Any, rows: ScoredRows, done: int = 0) -> Iterator[Batch]:
    """Yield batches of a size that fits the model's device."""
    return make_batches(rows, BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cpu"]), done)


def repeat_to_length(rows: Sequence[NDArray[np.int32]], length: int, scored: int) -> tuple[NDArray[np.int32], Any]:
    """Return one row of `length` tokens, made of the rows in turn, and its last `scored` positions."""
    row = np.resize(np.concatenate(rows), length).astype(np.int32)
    return row, np.arange(max(1, length - scored), length)
