"""What a row of the architecture table is, and how a table is matched with the tensors of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.architectures import operations, slots
from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.checkpoint import TensorInfo
from edgetune_converters.errors import ArchitectureError
from edgetune_converters.gguf.values import Value

WEIGHT_DTYPES = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class TensorRow:
    """One module of the family: its Hugging Face name, its slot, and what happens to its weight (and bias).

    `shape` gives the expected shape of the weight from the config. A bias, where the checkpoint has one, has the rows
    of its weight. A module that is `tied_to` another may be absent from a checkpoint whose config ties the two.
    """

    module: str
    slot: str
    shape: Callable[[ModelConfig], tuple[int, ...]]
    operation: str = "copy"
    bias: bool = False
    tied_to: str | None = None


@dataclass(frozen=True)
class Generated:
    """A tensor that is computed from the config: None where the config does not ask for it."""

    slot: str
    compute: Callable[[ModelConfig], NDArray[np.float32] | None]


MetadataRow = tuple[str, Callable[[ModelConfig], Value | None]]


@dataclass(frozen=True)
class Family:
    """A model family: rows, no code. `metadata` keys are given without the architecture's prefix."""

    name: str
    hf: tuple[str, ...]
    gguf: str
    tensors: tuple[TensorRow, ...]
    metadata: tuple[MetadataRow, ...]
    generated: tuple[Generated, ...] = ()
    requirements: tuple[Callable[[ModelConfig], str | None], ...] = ()
    notes: tuple[Callable[[ModelConfig], str | None], ...] = ()
    # tensors that old checkpoints carry and that hold nothing of the model
    ignored: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq", r".*\.attention\.masked_bias")


@dataclass(frozen=True)
class Bound:
    """A tensor of this model: where it comes from and what becomes of it. `layer` is None outside the blocks.

    `target` is the name by which an adapter speaks of it; a tied head is read from the embedding, but has its own name.
    """

    slot: str
    layer: int | None
    part: str
    target: str
    source: TensorInfo
    operation: str

    @property
    def gguf_name(self) -> str:
        """Its name in a GGUF file."""
        return slots.gguf_name(self.slot, self.layer, self.part)


def bind(family: Family, config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> list[Bound]:
    """Match every tensor of the checkpoint with its row.

    Errors: ArchitectureError listing every tensor that is missing, unknown, of a wrong shape or not of floats.
    """
    problems = [text for check in family.requirements if (text := check(config))]
    if problems:
        raise ArchitectureError.of_many(f"settings of this {family.name} model that cannot be exported", problems)
    bound, missing = _bound(family, config, tensors)
    known = {item.source.name for item in bound}
    ignored = re.compile("|".join(family.ignored))
    unknown = [name for name in tensors if name not in known and not ignored.fullmatch(name)]
    problems = [f"{name} is missing" for name in missing]
    problems += [f"{name} is not known in the {family.name} family" for name in sorted(unknown)]
    problems += [text for row, item in _with_rows(family, bound) for text in _misfits(row, item, config)]
    if problems:
        raise ArchitectureError.of_many(
            f"tensors that do not fit the {family.name} family", problems, "Is config.json the one of these weights?"
        )
    return bound


def _bound(family: Family, config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> tuple[list[Bound], list[str]]:
    bound, missing = [], []
    for row, layer in _places(family, config):
        module = row.module.format(layer=layer)
        weight = tensors.get(f"{module}.weight")
        bias = tensors.get(f"{module}.bias") if row.bias else None
        if weight is not None:
            bound.append(Bound(row.slot, layer, "weight", weight.name, weight, row.operation))
        elif row.tied_to and config.get("tie_word_embeddings", False) and f"{row.tied_to}.weight" in tensors:
            source = tensors[f"{row.tied_to}.weight"]
            bound.append(Bound(row.slot, layer, "weight", f"{module}.weight", source, row.operation))
        else:
            missing.append(f"{module}.weight")
        if bias is not None:
            bound.append(Bound(row.slot, layer, "bias", bias.name, bias, row.operation))
    return bound, missing


def _places(family: Family, config: ModelConfig) -> Iterator[tuple[TensorRow, int | None]]:
    for row in family.tensors:
        if "{layer}" not in row.module:
            yield row, None
            continue
        for layer in range(config.layers):
            yield row, layer


def _with_rows(family: Family, bound: list[Bound]) -> Iterator[tuple[TensorRow, Bound]]:
    by_slot = {row.slot: row for row in family.tensors}
    for item in bound:
        yield by_slot[item.slot], item


def _misfits(row: TensorRow, item: Bound, config: ModelConfig) -> Iterator[str]:
    """What is wrong with a tensor that was found."""
    wanted = row.shape(config) if item.part == "weight" else row.shape(config)[:1]
    name, shape = item.source.name, item.source.shape
    if shape != wanted:
        yield f"{name} has the shape {list(shape)}, config.json asks for {list(wanted)}"
    elif reason := operations.check(item.operation, shape[0], config):
        yield f"{name}: {reason}"
    if item.source.dtype not in WEIGHT_DTYPES:
        yield f"{name} is stored as {item.source.dtype}; {', '.join(WEIGHT_DTYPES)} are read"
