"""Shared steps of the capture: rows in the reference's layout, precision, choice of the model, greedy answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from edgetune.config import Config
from edgetune.data.masks import EncodedRow
from edgetune.reference.scored_rows import ScoredRows
from edgetune.training.adapters.virtual_tokens import is_active
from edgetune.training.loading import compute_dtype, four_bit_layers
from edgetune.training.resident import release_resident

GENERATION_BATCH = 32

OnTokens = Callable[[int], None]
"""Called with the number of answers that the tokens generated so far amount to; a few more where answers end early."""
OnAnswers = Callable[[dict[int, list[int]]], None]
"""Called with the answers of a batch, by the index of their prompts."""


def to_scored_rows(encoded: Sequence[EncodedRow]) -> ScoredRows:
    """Convert encoded rows to the reference's layout: one array of tokens, offsets of rows, scored positions."""
    lengths = [len(row.input_ids) for row in encoded]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.concatenate([np.asarray(row.input_ids, np.int32) for row in encoded])
    positions = [np.asarray(row.scored, np.int64) + start for row, start in zip(encoded, offsets[:-1], strict=True)]
    return ScoredRows(tokens, offsets, np.concatenate(positions))


def prepare_for_capture(model: Any) -> None:
    """Prepare the trained model for capture: no dropout, a key-value cache and, on the CPU, products in float32.

    On the CPU the reference is then computed from the dequantized base and the adapter without bfloat16 rounding.
    """
    model.eval()
    base = model.get_base_model()
    base.gradient_checkpointing_disable()
    base.config.use_cache = True
    if model.device.type == "cpu":
        for layer in four_bit_layers(model):
            layer.compute_dtype = torch.float32
        release_resident(model, unless=torch.float32)


def capture_precision(model: Any, config: Config) -> tuple[str, Callable[[], AbstractContextManager[Any]]]:
    """Return the name of the type in which capture computes, and a context manager that sets it."""
    if model.device.type == "cpu":
        return "float32", nullcontext
    dtype = compute_dtype(config)
    if dtype is torch.float32:
        return "float32", nullcontext
    return str(dtype).removeprefix("torch."), lambda: torch.autocast(model.device.type, dtype)


def select_model(model: Any, which: str) -> AbstractContextManager[Any]:
    """Return a context manager in which `model` is the "trained" or the "base" model."""
    context: AbstractContextManager[Any] = model.disable_adapter() if which == "base" else nullcontext()
    return context


@dataclass(frozen=True)
class GreedySettings:
    """Greedy generation: the most likely token, until a stop token, the end of the answer or `length` tokens."""

    stop_ids: list[int]
    pad_id: int
    length: int
    batch_size: int = GENERATION_BATCH
    is_ended: Callable[[list[int]], bool] | None = None
    """Whether an answer ends with its newest token, beside the stop tokens."""


def generate_greedy(
    model: Any,
    prompts: Sequence[Sequence[int]],
    settings: GreedySettings,
    on_answers: OnAnswers,
    known: Collection[int] = (),
    on_tokens: OnTokens | None = None,
) -> None:
    """Generate greedy answers as token ids, without the stop token; prompts of similar length share a batch.

    Args:
        model: A PeftModel that `prepare_for_capture` has prepared.
        prompts: Token ids of each prompt.
        settings: Stop tokens, padding and length.
        on_answers: Called after each batch.
        known: Indices of prompts that are left out, since their answers are known.
        on_tokens: Called after each token of a batch, which takes a minute on a slow machine.
    """
    model.get_base_model().generation_config = GenerationConfig()  # without the sampling options of the base
    generation = GenerationConfig(
        do_sample=False,
        max_new_tokens=settings.length,
        eos_token_id=settings.stop_ids,
        pad_token_id=settings.pad_id,
        use_cache=True,
    )
    order = sorted((index for index in range(len(prompts)) if index not in known), key=lambda i: len(prompts[i]))
    # PEFT puts virtual tokens before the padding, which would move the text away from them
    apart = is_active(model)
    for start, batch in _batches(order, [len(prompt) for prompt in prompts], settings.batch_size, apart=apart):
        ids, attended = _left_padded([prompts[index] for index in batch], settings.pad_id)
        criteria: list[StoppingCriteria] = []
        if on_tokens is not None:
            criteria.append(_Ticker(start, len(batch), ids.shape[1], settings.length, on_tokens))
        if settings.is_ended is not None:
            criteria.append(_EndOfAnswer(ids.shape[1], settings.is_ended))
        written = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=attended.to(model.device),
            generation_config=generation,
            stopping_criteria=StoppingCriteriaList(criteria),
        )
        answers = written[:, ids.shape[1] :].tolist()
        on_answers({i: _until_stop(answer, settings.stop_ids) for i, answer in zip(batch, answers, strict=True)})


def _batches(
    order: Sequence[int], lengths: Sequence[int], size: int, *, apart: bool
) -> Iterator[tuple[int, list[int]]]:
    """Yield the place in `order` and the prompts of each batch; with `apart` those of a batch have one length."""
    start = 0
    while start < len(order):
        batch = list(order[start : start + size])
        if apart:
            batch = [index for index in batch if lengths[index] == lengths[batch[0]]]
        yield start, batch
        start += len(batch)


class _Ticker(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
    """Reports each token of a batch, and stops nothing."""

    def __init__(self, done: int, count: int, prompt: int, length: int, on_tokens: OnTokens) -> None:
        self._done, self._count, self._prompt, self._length = done, count, prompt, length
        self._on_tokens = on_tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        generated = input_ids.shape[1] - self._prompt
        self._on_tokens(self._done + self._count * generated // self._length)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _EndOfAnswer(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
    """Stops each row whose answer is ended."""

    def __init__(self, prompt: int, is_ended: Callable[[list[int]], bool]) -> None:
        self._prompt, self._is_ended = prompt, is_ended

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        ended = [self._is_ended(answer) for answer in input_ids[:, self._prompt :].tolist()]
        return torch.tensor(ended, device=input_ids.device)


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad_id)
    attended = torch.zeros((len(prompts), longest), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        attended[row, longest - len(prompt) :] = 1
    return ids, attended


def _until_stop(answer: list[int], stop_ids: Sequence[int]) -> list[int]:
    end = next((index for index, id_ in enumerate(answer) if id_ in stop_ids), len(answer))
    return answer[:end]
