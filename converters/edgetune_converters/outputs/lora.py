"""An adapter as a GGUF file that llama.cpp applies to a base (`llama-cli -m base.gguf --lora adapter.gguf`).

The scale is folded into B and `adapter.lora.alpha` is 0, which llama.cpp reads as "no further scale": alpha/rank
supports neither rsLoRA nor an alpha per module. Source: llama.cpp, src/llama-adapter.cpp.

A change that is no product of two small factors is approximated by one where a rank is given; the relative error is
|D - B @ A| / |D| for its matrix D.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgetune_converters.adapters.change import Change
from edgetune_converters.adapters.low_rank import LowRank, low_rank, of_product
from edgetune_converters.architectures import BoundTensor, Piece, slots
from edgetune_converters.architectures.operations import View
from edgetune_converters.errors import AdapterError, RecipeError
from edgetune_converters.gguf.layout import TensorSpec
from edgetune_converters.gguf.split import SplitPlan
from edgetune_converters.gguf.types import BY_NAME
from edgetune_converters.gguf.values import Value, f32, string
from edgetune_converters.merging.expanded_blocks import BLOCKS
from edgetune_converters.model import Model
from edgetune_converters.outputs.base import OutputSummary
from edgetune_converters.outputs.gguf import StagedGguf
from edgetune_converters.provenance.hashing import InputHashes
from edgetune_converters.quantization.encode import encode_rows
from edgetune_converters.reading.checkpoint import Checkpoint
from edgetune_converters.tensors import F32, RowIndex

TYPES = ("f32", "f16", "bf16")
DEFAULT_MAX_ERROR = 0.1
"""Largest relative error of approximated changes."""
_ROWS = 1024  # compared at a time
_HINT = "Write the merged model instead: --format gguf"


class Factor(NamedTuple):
    """One tensor of the file, computed when it is written."""

    name: str
    values: F32


class LoraRank(NamedTuple):
    """The rank of the pairs that approximate a change, and the largest relative error over all of them."""

    rank: int | None = None
    """None refuses what is no pair A, B."""
    max_error: float = DEFAULT_MAX_ERROR


class LoraFactors(NamedTuple):
    """All A and B, and the relative errors of the tensors that are approximated."""

    factors: list[Factor]
    errors: dict[str, float]
    total: float = 0.0
    """Relative error over all approximated changes."""

    @property
    def notes(self) -> list[str]:
        """Say what is approximated, and how well."""
        if not self.errors:
            return []
        worst = max(self.errors, key=lambda name: self.errors[name])
        count = f"{len(self.errors)} of {len(self.factors) // 2} changes are"
        return [
            f"{count} approximated by pairs A, B: the relative error is {self.total:.2g}, and at most "
            f"{self.errors[worst]:.2g} ({worst})"
        ]


def check_type(name: str) -> str:
    """Return a storage type of a GGUF adapter in lower case. Raises RecipeError."""
    if name.lower() in TYPES:
        return name.lower()
    raise RecipeError(f"a GGUF adapter cannot be written as {name!r}", f"Give one of {', '.join(TYPES)} with -q")


def lora_factors_of_model(model: Model, asked: LoraRank = LoraRank()) -> LoraFactors:  # noqa: B008 - immutable
    """Return A and B of every tensor that the adapter of a model changes.

    Raises:
        AdapterError: There is no adapter, or llama.cpp's adapters cannot express it, or not at the rank that is given.
    """
    if model.adapter is None:
        raise AdapterError("there is no adapter to write as gguf-lora", "Give a run, or --adapter DIR")
    if model.soft_prompt is not None:
        raise AdapterError(
            "a soft prompt changes no matrix: it is rows of the vocabulary, which a GGUF adapter cannot add",
            "Export the whole model: --format gguf, onnx or safetensors",
        )
    if model.resized is not None:
        raise AdapterError(
            f"the adapter has {model.resized.rows} rows of embeddings and the base {model.resized.rows_before}: "
            "llama.cpp applies an adapter only to a base of the same vocabulary",
            _HINT,
        )
    if model.adapter.config.raw.get(BLOCKS) is not None:
        raise AdapterError(
            "the adapter adds blocks to the base, and llama.cpp applies an adapter only to a base of the same blocks",
            _HINT,
        )
    made = _Factoring(model, asked)
    made.run()
    return made.result()


class _Factoring:
    """Makes A and B of all changed tensors; changes that a GGUF adapter cannot hold are listed."""

    def __init__(self, model: Model, asked: LoraRank) -> None:
        self._model, self._asked = model, asked
        self._factors: list[Factor] = []
        self._problems: list[str] = []
        self._made: dict[str, LowRank] = {}
        self._approximable = False

    def run(self) -> None:
        model = self._model
        tied = _tied(model.bound, model.checkpoint)
        for item in model.bound:
            touched = [piece for piece in item.pieces if _change(piece, model.changes) is not None]
            if not touched:
                continue
            reason = _refused(item, model.changes, model.checkpoint, tied)
            ends = tied and item.slot in (slots.EMBEDDING, slots.OUTPUT)
            matrix = item.part == "weight" and len(item.shape) == 2 and not ends
            if reason is None:
                self._pair(item)
            elif matrix and self._asked.rank is not None:
                self._approximate(item, self._asked.rank)
            else:
                self._approximable = self._approximable or matrix
                self._problems.append(f"{touched[0].target}: {reason}")

    def result(self) -> LoraFactors:
        """Return A and B. Raises AdapterError."""
        if self._problems:
            hint = f"{_HINT}, or approximate matrices with --lora-rank N" if self._approximable else _HINT
            raise AdapterError.of_many("changes that a GGUF adapter has no place for", self._problems, hint)
        errors = {
            name: math.sqrt(each.error / each.norm) if each.norm else 0.0 for name, each in sorted(self._made.items())
        }
        norm = sum(each.norm for each in self._made.values())
        total = math.sqrt(sum(each.error for each in self._made.values()) / norm) if norm else 0.0
        if total > self._asked.max_error:
            worst = max(errors, key=lambda name: errors[name])
            raise AdapterError(
                f"pairs A, B of rank {self._asked.rank} leave out too much of the changes: the relative error is "
                f"{total:.2g} (largest: {errors[worst]:.2g} of {worst}), and at most {self._asked.max_error:g} is "
                "allowed",
                f"{_HINT}, give a higher --lora-rank, or allow the error with --lora-max-error",
            )
        return LoraFactors(sorted(self._factors), errors, total)

    def _pair(self, item: BoundTensor) -> None:
        change = self._model.changes[item.pieces[0].target]
        if change.factors is None:
            return
        left, right = change.factors()
        if item.pieces[0].stored_transposed:
            left, right = right.T, left.T
        rows = np.concatenate([_seen(piece, left) for piece in item.pieces])
        rank = self._asked.rank
        if rank is not None and right.shape[0] > rank:
            made = self._made[item.gguf_name] = of_product(rows, right, rank)
            rows, right = made.left, made.right
        self._add(item, rows, right)

    def _approximate(self, item: BoundTensor, rank: int) -> None:
        made = low_rank(self._difference(item), rank)
        if made.norm:
            self._made[item.gguf_name] = made
            self._add(item, made.left, made.right)

    def _difference(self, item: BoundTensor) -> F32:
        """Return what the adapter adds to a tensor of GGUF, [rows, columns]."""
        checkpoint = self._model.checkpoint
        tensor = next(each for each in self._model.tensors if each.gguf_name == item.gguf_name)
        before = replace(tensor, parts=tuple(replace(part, change=None) for part in tensor.parts))
        pairs = zip(tensor.blocks(checkpoint), before.blocks(checkpoint), strict=True)
        return np.concatenate([after.floats - base.floats for after, base in pairs])

    def _add(self, item: BoundTensor, rows: F32, right: F32) -> None:
        """Keep A [r, k] and B [n, r]. An embedding is looked up, so its pair is reversed: A [n, r], B [k, r]."""
        a, b = (rows, right.T) if item.slot == slots.EMBEDDING else (right, rows)
        self._factors += [
            Factor(f"{item.gguf_name}.lora_a", np.ascontiguousarray(a)),
            Factor(f"{item.gguf_name}.lora_b", np.ascontiguousarray(b)),
        ]


def _change(piece: Piece, changes: Mapping[str, Change]) -> Change | None:
    """Return the change of a piece, or of the parameter that it is a part of."""
    return changes.get(piece.target) or (changes.get(piece.part_of.target) if piece.part_of else None)


def _tied(bound: Sequence[BoundTensor], checkpoint: Checkpoint) -> bool:
    """Whether the base's GGUF file has one matrix for embedding and output."""
    ends = [item.pieces[0].source.name for item in bound if item.slot in (slots.EMBEDDING, slots.OUTPUT)]
    return len(ends) == 1 or ends[0] == ends[1] or checkpoint.equal(ends[0], ends[1])


_BOTH_SIDES = "the embedding is also the output matrix, which llama.cpp cannot change on one side"
_SEVERAL = "it is one of several that make one tensor in GGUF, such as experts"


def _refused(item: BoundTensor, changes: Mapping[str, Change], checkpoint: Checkpoint, tied: bool) -> str | None:
    first = item.pieces[0]
    change = changes.get(first.target)
    if change is None or len({piece.target for piece in item.pieces}) > 1 or _is_stack(change):
        return _SEVERAL
    if tied and _adds(change) and item.slot in (slots.EMBEDDING, slots.OUTPUT):
        return _BOTH_SIDES
    if change.transform is not None:
        return "its change is no product of two small matrices, and llama.cpp takes only A and B"
    if _replaces(first, change, checkpoint):
        return "it is replaced whole (modules_to_save, or a trained bias), and llama.cpp takes only A and B"
    if item.part == "bias" and change.factors is not None:
        return "it is a bias (lora_bias), and llama.cpp takes only A and B of weights"
    if change.token_rows is not None:
        return "rows of it are replaced (trainable_token_indices), and llama.cpp takes only A and B"
    return _rows_reason(item)


def _adds(change: Change) -> bool:
    """Whether a change is more than another value of the tensor or of its rows."""
    return change.factors is not None or change.transform is not None


def targets_without_place(bound: Sequence[BoundTensor]) -> dict[str, str]:
    """Return the targets of which llama.cpp's adapters can hold no A and B, and why; known without an adapter."""
    found: dict[str, str] = {}
    for item in bound:
        several = len({piece.target for piece in item.pieces}) > 1 or len(item.pieces[0].source.shape) > 2
        reason = _SEVERAL if several else _rows_reason(item)
        found |= {piece.target: reason for piece in item.pieces if reason}
    return found


def _rows_reason(item: BoundTensor) -> str | None:
    if any(piece.view.unit or (piece.view.transpose and not piece.stored_transposed) for piece in item.pieces):
        return "its rows are made in a way that A and B do not follow"
    return None


def _is_stack(change: Change) -> bool:
    """Whether there is a pair A, B for each of several experts."""
    return change.factors is not None and change.factors()[0].ndim > 2


def _replaces(piece: Piece, change: Change, checkpoint: Checkpoint) -> bool:
    """Whether the adapter holds other weights than the base: PEFT also saves embeddings that it did not train."""
    if change.replacement is None:
        return False
    count = math.prod(piece.source.shape) // piece.columns
    for first in range(0, count, _ROWS):
        rows = slice(first, min(first + _ROWS, count))
        if not np.array_equal(change.file.rows(change.replacement, rows), checkpoint.rows(piece.source, rows)):
            return True
    return False


def _seen(piece: Piece, left: F32) -> F32:
    """Return B in the row order of the GGUF tensor."""

    def read(rows: RowIndex, columns: RowIndex) -> F32:
        found: F32 = left[rows][:, columns]
        return found

    view = View(piece.view.steps)
    return view.read(read, left.shape[1], 0, view.shape(*left.shape)[0])


class LoraOutput(StagedGguf):
    """A GGUF file of the adapter alone. It is small and takes nothing from the pass: `finish` writes it."""

    def __init__(self, path: Path, type_name: str, made: LoraFactors, general: Mapping[str, Value]) -> None:
        self._type = type_name
        self._made, self._factors = made, made.factors
        factors = made.factors
        specs = [TensorSpec(item.name, item.values.shape, BY_NAME[type_name]) for item in factors]
        own = {"general.type": string("adapter"), "adapter.type": string("lora"), "adapter.lora.alpha": f32(0.0)}
        super().__init__(SplitPlan.of(path, {**general, **own}, specs))

    def finish(self, inputs: InputHashes) -> None:
        for item in self._factors:
            self._writer.append(encode_rows(item.values, self._type, item.name, 0))
        super().finish(inputs)

    def publish(self) -> OutputSummary:
        weights = sum(item.values.size for item in self._factors)
        size = weights * BY_NAME[self._type].bytes
        return OutputSummary(
            artifact=self.path,
            sha256=self._writer.publish()[self.path.name],
            size=self.size,
            format="gguf-lora",
            recipe=self._type,
            types={self._type: size},
            tensors={item.name: self._type for item in self._factors},
            weights=weights,
            bits_per_weight=size * 8 / weights,
            lora_error=dict(self._made.errors) or None,
            notes=tuple(self._made.notes),
        )
