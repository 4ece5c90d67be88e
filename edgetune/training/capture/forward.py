"""Logits of held-out rows in batches: one pass through the network, then its head over a few positions at a time.

Rows of one batch are padded on the right, where a causal model does not look, so that the figures are those of a row by
itself but for the rounding of products of another shape. However large the vocabulary, no more than BLOCK_BYTES of
logits are alive.
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

BLOCK_BYTES = 128 * 2**20
BATCH_TOKENS = {"cuda": 8192, "cpu": 1024}
"""Tokens of a batch with their padding."""

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Batch:
    """Some consecutive rows: their ids and, for each, the scored positions within it."""

    ids: list[NDArray[np.int32]]
    scored: list[NDArray[np.int64]]

    @property
    def targets(self) -> NDArray[np.int32]:
        """The tokens that are predicted, row after row."""
        return np.concatenate([ids[scored] for ids, scored in zip(self.ids, self.scored, strict=True)])


def make_batches(rows: ScoredRows, tokens: int, done: int = 0) -> Iterator[Batch]:
    """The rows in order, in batches of at most `tokens` tokens; a longer row is alone.

    Rows whose positions are all among the first `done` are left out.
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
    """Logits f32 [m, V] that predict the scored positions of each row of the batch in turn."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    padded = np.zeros((len(batch.ids), max(map(len, batch.ids))), np.int64)
    for row, ids in enumerate(batch.ids):
        padded[row, : len(ids)] = ids
    found = causal.base_model(input_ids=torch.from_numpy(padded).to(model.device), use_cache=False)
    size = max(1, BLOCK_BYTES // (4 * causal.config.get_text_config().vocab_size))
    for row, scored in enumerate(batch.scored):
        predictors = torch.from_numpy(scored - 1).to(model.device)
        for block in torch.split(predictors, size):
            said = type(found)(**{**found, "last_hidden_state": found[0][row : row + 1, block]})
            yield _head(causal, said, len(block)).float().cpu().numpy()


def _head(causal: Any, said: Any, count: int) -> torch.Tensor:
    """Logits [count, V] of the network's output, by whatever the model does after its last layer (caps, scales)."""
    with _standing_in(causal.base_model, said):
        found: torch.Tensor = causal(input_ids=torch.zeros((1, count), dtype=torch.long), use_cache=False).logits
    return found[0]


@contextmanager
def _standing_in(network: Any, said: Any) -> Iterator[None]:
    """For a while, the network answers with this output instead of computing one."""
    before = network.__dict__.get("forward")
    network.forward = lambda *_, **__: said
    try:
        yield
    finally:
        if before is None:
            del network.forward
        else:
            network.forward = before


def batches_for_device(model: Any, rows: ScoredRows, done: int = 0) -> Iterator[Batch]:
    """Batches of a size for this device."""
    return make_batches(rows, BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cpu"]), done)


def repeat_to_length(rows: Sequence[NDArray[np.int32]], length: int, scored: int) -> tuple[NDArray[np.int32], Any]:
    """One row of `length` tokens, made of the rows in turn, and its last `scored` positions."""
    tokens = np.concatenate(rows)
    found = np.resize(tokens, length).astype(np.int32)
    return found, np.arange(max(1, length - scored), length)
