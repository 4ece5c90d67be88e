"""A base whose vocabulary was resized before the training of an adapter: the adapter holds embedding and head whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.adapters.adapter import Adapter
from edgetune_converters.adapters.base_targets import BaseTargets
from edgetune_converters.architectures import BoundTensor, Family, ModelConfig, Piece, bind, slots
from edgetune_converters.errors import AdapterError
from edgetune_converters.reading.checkpoint import Checkpoint
from edgetune_converters.tensors import ALL, F32, RowIndex, TensorInfo, widened


@dataclass(frozen=True)
class ResizedVocabulary:
    """The base with the vocabulary of an adapter."""

    config: ModelConfig
    bound: list[BoundTensor]
    rows: int
    """Rows of the adapter's embedding."""
    rows_before: int
    """Rows of the base's own embedding."""

    @property
    def note(self) -> str:
        """State the numbers of rows."""
        return (
            f"the adapter was trained with {self.rows} rows of embeddings, the base has {self.rows_before}: "
            f"the model is written with the adapter's embedding and vocab_size {self.rows}"
        )


def with_vocabulary_of(
    adapter: Adapter,
    family: Family,
    config: ModelConfig,
    checkpoint: Checkpoint,
    bound: Sequence[BoundTensor],
    base: BaseTargets,
) -> ResizedVocabulary | None:
    """Return the base with the rows of embeddings that an adapter has; None where they are as many as before.

    The embedding and the head of `checkpoint` become those of the adapter.

    Raises:
        AdapterError: The adapter lacks the embedding or the head with the new number of rows.
    """
    ends = {
        piece.target: piece
        for item in bound
        if item.slot in (slots.EMBEDDING, slots.OUTPUT)
        for piece in item.pieces
    }  # fmt: skip
    found = {base.renamed(name): info for name, info in adapter.tensors(base).replacements.items()}
    replaced = {target: found[target] for target in ends if target in found}
    if new := _new_token_rows(adapter, base, ends, replaced):
        count = max(new) + 1
        for target, piece in ends.items():
            if family.canonical_name(piece.source.name) == target:
                _pad(checkpoint, piece.source.name, count)
        return _resized(family, config, checkpoint, ends, count)
    rows = _new_rows(adapter, base, ends, replaced)
    if rows is None:
        return None
    missing = [target for target in ends if target not in replaced and not _follows(target, ends, replaced)]
    short = [target for target, info in replaced.items() if info.shape[0] != rows]
    if missing or short:
        raise _incomplete(adapter, rows, config.vocab_size, (missing or short)[0])
    for target, info in replaced.items():
        own = ends[target].source.name
        if family.canonical_name(own) == target:
            checkpoint.substitute(own, adapter.file, info)
    return _resized(family, config, checkpoint, ends, rows)


def _resized(
    family: Family, config: ModelConfig, checkpoint: Checkpoint, ends: Mapping[str, Piece], rows: int
) -> ResizedVocabulary:
    """Bind the base again, whose embedding and head have `rows` rows now."""
    views = [piece.view for piece in ends.values()]
    resized = ModelConfig(with_rows(config.raw, rows))
    bound = bind(family, resized, checkpoint.tensors, checkpoint.zero_biases)
    now = {piece.target: piece.view for item in bound for piece in item.pieces}
    if [now[target] for target in ends] != views:
        raise AdapterError(
            f"the {family.name} family cannot have {rows} rows of embeddings: its head depends on their number",
            _merge_hint(rows),
        )
    return ResizedVocabulary(resized, bound, rows, config.vocab_size)


class _Padded:
    """Reads a tensor with rows of zeros behind its own, which the adapter's rows replace."""

    def __init__(self, checkpoint: Checkpoint, own: TensorInfo) -> None:
        self._checkpoint, self._own = checkpoint, own

    def rows(self, info: TensorInfo, rows: RowIndex, columns: RowIndex = ALL) -> F32:
        return widened(self.stored(info, rows, columns))

    def stored(self, info: TensorInfo, rows: RowIndex, columns: RowIndex = ALL) -> NDArray[Any]:
        wanted = np.arange(info.shape[0])[rows]
        there = wanted < self._own.shape[0]
        found = self._checkpoint.stored(self._own, wanted[there], columns)
        padded = np.zeros((len(wanted), found.shape[1]), found.dtype)
        padded[there] = found
        return padded

    def forget(self, info: TensorInfo, rows: RowIndex, columns: RowIndex = ALL) -> None:
        self._checkpoint.forget(self._own, np.arange(self._own.shape[0])[rows])


def _pad(checkpoint: Checkpoint, name: str, rows: int) -> None:
    info = checkpoint.tensors[name]
    own = checkpoint.set_aside(name)
    checkpoint.substitute(name, _Padded(checkpoint, own), replace(info, shape=(rows, *info.shape[1:])))


def _new_token_rows(
    adapter: Adapter, base: BaseTargets, ends: Mapping[str, Piece], replaced: Mapping[str, TensorInfo]
) -> list[int]:
    """Return the ids of trained tokens behind the rows of the base.

    Raises AdapterError unless they follow each other, and those of the head are those of the embedding.
    """
    rows_of = {}
    for module in adapter.tensors(base).token_rows:
        target = base.renamed(f"{module}.weight")
        if target in ends and target not in replaced:
            before = ends[target].source.shape[0]
            rows_of[target] = [id_ for id_ in sorted(adapter.config.token_ids(module)) if id_ >= before]
    new = next(iter(rows_of.values()), [])
    if not new:
        return []
    before = next(iter(ends.values())).source.shape[0]
    untied = [target for target, piece in ends.items() if base.renamed(piece.source.name) == target]
    if new != list(range(before, before + len(new))) or any(rows_of.get(target) != new for target in untied):
        raise _incomplete(adapter, max(new) + 1, before, untied[-1])
    return new


_PAIRS = ("LORA", "ADALORA")


def _new_rows(
    adapter: Adapter, base: BaseTargets, ends: Mapping[str, Piece], replaced: Mapping[str, TensorInfo]
) -> int | None:
    """The number of rows of the adapter's embedding or head, where it is not the base's."""
    for target, info in replaced.items():
        before = ends[target].source.shape
        if info.shape[1:] == before[1:] and info.shape[0] != before[0]:
            return info.shape[0]
    if adapter.config.peft_type not in _PAIRS:  # factors of other kinds do not show the rows of the matrix
        return None
    for module, roles in adapter.tensors(base).modules.items():
        piece = ends.get(base.renamed(f"{module}.weight"))
        pair = roles.get("embedding_A"), roles.get("B")
        if piece is None or pair == (None, None):
            continue
        rows = pair[0].shape[-1] if pair[0] is not None else pair[1].shape[0] if pair[1] is not None else 0
        if rows != piece.source.shape[0]:
            return rows
    return None


def _follows(target: str, ends: Mapping[str, Piece], replaced: Mapping[str, TensorInfo]) -> bool:
    """Whether a head is the matrix of the embedding below its trained change."""
    shared = [name for name, piece in ends.items() if name != target and piece.source == ends[target].source]
    return any(name in replaced and ".base_layer." in replaced[name].name for name in shared)


def with_rows(raw: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Return config.json with another number of rows of the embedding."""
    inner = raw.get("text_config")
    if not isinstance(inner, Mapping):
        return {**raw, "vocab_size": rows}
    own = {"vocab_size": rows} if "vocab_size" in raw else {}
    return {**raw, **own, "text_config": {**inner, "vocab_size": rows}}


def _incomplete(adapter: Adapter, rows: int, before: int, target: str) -> AdapterError:
    return AdapterError(
        f"the adapter {adapter.path} was trained with {rows} rows of embeddings, the base has {before}, and the "
        f"adapter has no {target} of {rows} rows",
        _merge_hint(rows),
    )


def _merge_hint(rows: int) -> str:
    return (
        "Give the base as it was trained with --base: load it with transformers, call "
        f"model.resize_token_embeddings({rows}), and save it with save_pretrained(DIR)"
    )
