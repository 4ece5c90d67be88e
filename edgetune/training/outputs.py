"""What base and trained model say: log-probabilities on held-out rows, greedy answers to test rows.

One row at a time and without padding, so that the figures are those of the row itself; a long row's logits are made in
blocks of positions, so that no more than BLOCK_BYTES of them are alive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig

from edgetune.config import Config
from edgetune.data.masks import EncodedRow
from edgetune.reference import Rows
from edgetune.training.loading import compute_dtype, four_bit_layers

BLOCK_BYTES = 128 * 2**20
GENERATION_BATCH = 32

F32 = NDArray[np.float32]
Advance = Callable[[int], None]
"""Called with how many prompts have been answered."""


def to_rows(encoded: Sequence[EncodedRow]) -> Rows:
    """Encoded rows in the reference's layout: one array of tokens, offsets of rows, scored positions."""
    lengths = [len(row.input_ids) for row in encoded]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.concatenate([np.asarray(row.input_ids, np.int32) for row in encoded])
    positions = [np.asarray(row.scored, np.int64) + start for row, start in zip(encoded, offsets[:-1], strict=True)]
    return Rows(tokens, offsets, np.concatenate(positions))


def prepare(model: Any) -> None:
    """Ready the trained model for capture: no dropout, a key-value cache and, on the CPU, products in float32.

    There the reference is then the exact product of the dequantized base and the adapter, free of bfloat16 noise.
    """
    model.eval()
    base = model.get_base_model()
    base.gradient_checkpointing_disable()
    base.config.use_cache = True
    if model.device.type == "cpu":
        for layer in four_bit_layers(model):
            layer.compute_dtype = torch.float32


def products_in(model: Any, config: Config) -> tuple[str, Callable[[], AbstractContextManager[Any]]]:
    """(name of the type, context) in which capture computes."""
    if model.device.type == "cpu":
        return "float32", nullcontext
    dtype = compute_dtype(config)
    if dtype is torch.float32:
        return "float32", nullcontext
    return str(dtype).removeprefix("torch."), lambda: torch.autocast(model.device.type, dtype)


def row_logits(model: Any, row: EncodedRow) -> Iterator[F32]:
    """Logits f32 [m, V] that predict the scored positions of a row, in order, in blocks of bounded size."""
    ids = torch.tensor([row.input_ids], device=model.device)
    predictors = torch.tensor(row.scored, device=model.device) - 1
    size = max(1, BLOCK_BYTES // (4 * model.get_base_model().config.get_text_config().vocab_size))
    for block in torch.split(predictors, size):
        logits = model(input_ids=ids, logits_to_keep=block, use_cache=False).logits[0]
        yield logits.float().cpu().numpy()


@dataclass(frozen=True)
class Greedy:
    """How answers are generated: the likeliest token each time, until a stop token or `length` tokens."""

    stop_ids: list[int]
    pad_id: int
    length: int


def greedy(model: Any, prompts: Sequence[Sequence[int]], settings: Greedy, advance: Advance) -> list[list[int]]:
    """Answers as ids, without the token at which each stops; prompts of similar length share a batch."""
    model.get_base_model().generation_config = GenerationConfig()  # nothing of the base's own sampling
    generation = GenerationConfig(
        do_sample=False,
        max_new_tokens=settings.length,
        eos_token_id=settings.stop_ids,
        pad_token_id=settings.pad_id,
        use_cache=True,
    )
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: dict[int, list[int]] = {}
    for start in range(0, len(order), GENERATION_BATCH):
        batch = order[start : start + GENERATION_BATCH]
        ids, attended = _left_padded([prompts[index] for index in batch], settings.pad_id)
        written = model.generate(
            input_ids=ids.to(model.device), attention_mask=attended.to(model.device), generation_config=generation
        )
        for index, answer in zip(batch, written[:, ids.shape[1] :].tolist(), strict=True):
            answers[index] = _until_stop(answer, settings.stop_ids)
        advance(len(answers))
    return [answers[index] for index in range(len(prompts))]


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad_id)
    attended = torch.zeros((len(prompts), longest), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        attended[row, longest - len(prompt) :] = 1
    return ids, attended


def _until_stop(answer: list[int], stop_ids: Sequence[int]) -> list[int]:
    end = next((place for place, id_ in enumerate(answer) if id_ in stop_ids), len(answer))
    return answer[:end]
