"""A soft prompt as rows of the vocabulary: the embedding of n new tokens, which the chat template writes first.

The new tokens take the ids behind the last token of the tokenizer. Where the embedding has unused rows there (padding),
they are those of the new tokens, and the output matrix stays what it was: the logits are exactly those of PEFT.
Otherwise embedding and output matrix grow. The new rows of the output matrix are its mean row: the logit of a new token
is then the mean of all logits, which is never above the largest one, and its probability is at most 1/V by Jensen's
inequality (exp of a mean <= mean of exp).

A tied output matrix is untied: its rows would be the soft prompt, whose logits have no bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.adapters.change import Change
from edgetune_converters.adapters.soft_prompt import EMBEDDINGS, SoftPromptAdapter
from edgetune_converters.adapters.token_rows import TokenRows
from edgetune_converters.architectures import BoundTensor, Family, Head, ModelConfig, bind, slots
from edgetune_converters.errors import AdapterError
from edgetune_converters.merging.resized_vocabulary import with_rows
from edgetune_converters.reading.checkpoint import Checkpoint
from edgetune_converters.reading.safetensors_file import row_count
from edgetune_converters.tensors import ALL, F32, RowIndex, TensorInfo, widened

_BLOCK = 4096  # rows of a matrix that are read at a time


@dataclass(frozen=True)
class SoftPromptRows:
    """The place of a soft prompt in the vocabulary."""

    first: int
    """Id of the first soft token."""
    count: int
    added: int
    """Rows by which the embedding grows; 0 where unused rows suffice."""
    was_tied: bool
    """Whether the base has one matrix for embedding and output."""

    @property
    def notes(self) -> list[str]:
        """Notes for the receipt."""
        last = self.first + self.count - 1
        place = f"{self.added} of them new" if self.added else "all of them unused by the base"
        notes = [f"the soft prompt is the rows {self.first} to {last} of the embedding, {place}"]
        if self.added:
            notes.append(
                f"the output matrix has {self.added} new rows, each its mean row: their logits are the mean of all "
                "logits, so that a new token is never the most likely one"
            )
        if self.was_tied:
            notes.append(
                "the embedding was also the output matrix: the file holds an output matrix of its own, of the base's "
                "rows, since those of the soft prompt could win"
            )
        return notes


@dataclass(frozen=True)
class _SoftRows(TokenRows):
    """The rows of a soft prompt, divided by what the model multiplies looked-up rows with."""

    rows: F32

    def read(self) -> F32:
        return self.rows


class GrownMatrix:
    """A matrix of a checkpoint with further rows, each of which is the mean of its own rows."""

    def __init__(self, own: Checkpoint, info: TensorInfo) -> None:
        self._own, self._info = own, info

    @cached_property
    def _mean(self) -> NDArray[np.generic]:
        """The mean row [1, k] in f64, rounded to the type in which rows are stored."""
        count = row_count(self._info.shape)
        total = np.zeros(self._info.shape[-1], np.float64)
        for first in range(0, count, _BLOCK):
            total += self._own.rows(self._info, slice(first, min(first + _BLOCK, count))).sum(0, dtype=np.float64)
        mean = (total / count).astype(np.float32)[None]
        like = self._own.stored(self._info, slice(0, 1)).dtype
        return _bfloat16(mean) if like == np.uint16 else mean.astype(like)

    def stored(self, info: TensorInfo, rows: RowIndex, columns: RowIndex = ALL) -> NDArray[np.generic]:
        """Return rows; weights of 16 bits keep their type."""
        count = row_count(self._info.shape)
        numbers = np.arange(*rows.indices(row_count(info.shape))) if isinstance(rows, slice) else rows
        inside = numbers < count
        if inside.all():
            return self._own.stored(self._info, rows, columns)
        if not inside.any():
            return np.repeat(self._mean[:, columns], len(numbers), axis=0)
        own = self._own.stored(self._info, numbers[inside], columns)
        found = np.empty((len(numbers), own.shape[1]), own.dtype)
        found[inside], found[~inside] = own, self._mean[:, columns]
        return found

    def rows(self, info: TensorInfo, rows: RowIndex, columns: RowIndex = ALL) -> F32:
        """Return rows in f32."""
        return np.array(widened(self.stored(info, rows, columns)), np.float32)

    def forget(self, info: TensorInfo, rows: RowIndex, columns: RowIndex = ALL) -> None:
        """Let the system drop the pages of these rows."""
        count = row_count(self._info.shape)
        if isinstance(rows, slice):
            self._own.forget(self._info, slice(*rows.indices(count)[:2]))
        elif len(inside := rows[rows < count]):
            self._own.forget(self._info, inside)


def _bfloat16(values: F32) -> NDArray[np.uint16]:
    """Round f32 to bf16 as its bits, to nearest even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def place_rows(
    adapter: SoftPromptAdapter,
    first: int,
    family: Family,
    config: ModelConfig,
    checkpoint: Checkpoint,
    bound: Sequence[BoundTensor],
) -> tuple[SoftPromptRows, ModelConfig, list[BoundTensor], dict[str, Change]]:
    """Return the place of a soft prompt, and config, tensors and changes of the base with it.

    Args:
        adapter: The soft prompt.
        first: The number of tokens of the tokenizer, which is the id of the first soft token.
        family: The family of the base.
        config: Its config.json.
        checkpoint: Its tensors; embedding and output matrix grow where they have too few rows.
        bound: Its tensors by slot.

    Raises:
        AdapterError: The soft prompt is of another width than the base.
    """
    ends = [item for item in bound if item.slot in (slots.EMBEDDING, slots.OUTPUT) and item.part == "weight"]
    pieces = {item.slot: item.pieces[0] for item in ends}
    embedding = pieces[slots.EMBEDDING]
    width, have = embedding.source.shape[-1], embedding.source.shape[0]
    if adapter.values.shape[1] != width:
        raise AdapterError(
            f"the soft prompt {adapter.path} has a width of {adapter.values.shape[1]}, the base one of {width}",
            "Was it trained on this base model?",
        )
    head = pieces.get(slots.OUTPUT)
    tied = head is None or head.source.name == embedding.source.name
    rows = max(have, first + adapter.count)
    place = SoftPromptRows(first, adapter.count, rows - have, tied)
    if rows > have:
        for name in {piece.source.name for piece in pieces.values()}:
            before = checkpoint.set_aside(name)
            grown = replace(before, shape=(rows, *before.shape[1:]), bytes=before.bytes // before.shape[0] * rows)
            checkpoint.substitute(name, GrownMatrix(checkpoint, before), grown)
        config = ModelConfig(with_rows(config.raw, rows))
        bound = bind(family, config, checkpoint.tensors, checkpoint.zero_biases)
    values = adapter.values / np.float32(_lookup_scale(family, config))
    ids = range(first, first + adapter.count)
    change = Change(adapter.file, token_rows=_SoftRows(adapter.file, adapter.file.tensors[EMBEDDINGS], ids, values))
    return place, config, list(bound), {embedding.target: change}


def why_not_placed(family: Family, format_: str, *, is_gguf: bool) -> str | None:
    """Return why no soft prompt can be exported in a format with a base of a family, or a GGUF file; None if it can."""
    if is_gguf:
        return "it adds tokens to the tokenizer's files, which a GGUF base does not have"
    if format_ == "gguf" and family.head is Head.NEVER:
        return f"gguf needs an output matrix beside the embedding, and llama.cpp has none for {family.name}"
    return None


def _lookup_scale(family: Family, config: ModelConfig) -> float:
    """The factor of looked-up rows that transformers does not apply to vectors given in their place."""
    traits = family.onnx
    return traits.embedding_scale(config) if traits is not None and traits.scales_lookup else 1.0
