"""The row types of the architecture table, and matching a table with the tensors of a checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.architectures import slots
from edgetune_converters.architectures.class_defaults import CLASS_DEFAULTS
from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.architectures.decoder import Traits
from edgetune_converters.architectures.operations import COPY, View
from edgetune_converters.errors import ArchitectureError
from edgetune_converters.gguf.types import BY_ID
from edgetune_converters.gguf.values import Value
from edgetune_converters.tensors import QUANTIZED, TensorInfo

WEIGHT_DTYPES = ("F32", "F16", "BF16", "F64", *QUANTIZED, *(kind.name.upper() for kind in BY_ID.values()))
# fields of config.json by which linear layers have biases -> what the names of these layers have in common
_BIAS_FLAGS = {
    **dict.fromkeys(("attention_bias", "use_qkv_bias", "qkv_bias", "attn_bias"), "att"),
    "mlp_bias": "mlp",
    **dict.fromkeys(("use_bias", "bias"), ""),
}
# as above, with the layers that transformers' classes make without a bias if the field is false
SWITCHED_BIASES = {
    "attention_bias": re.compile(r"\bself_attn\.[qkvo]_proj\.bias$"),
    "use_qkv_bias": re.compile(r"\bself_attn\.[qkv]_proj\.bias$"),
    "mlp_bias": re.compile(r"\bmlp\.(gate|up|down)_proj\.bias$"),
}

ROTARY_BUFFERS = (r".*\brotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)", r"(.*\.)?position_ids")
"""Tensors that transformers computes, and that old checkpoints hold."""

Shape = Callable[[ModelConfig], tuple[int, ...]]
Views = Callable[[ModelConfig], Sequence[View]]
When = Callable[[ModelConfig, int], bool]
Requirement = Callable[[ModelConfig], str | None]


def copied(config: ModelConfig) -> Sequence[View]:
    """The default view: rows unchanged."""
    return (COPY,)


def _always(config: ModelConfig, layer: int) -> bool:
    return True


@dataclass(frozen=True)
class FusedParameter:
    """The parameter of all experts in which transformers holds this module from row `first` on.

    Adapters name this parameter instead of the single modules. `transposed`: it holds the matrices transposed.
    """

    parameter: str
    shape: Shape
    first: Callable[[ModelConfig], int]
    transposed: bool = False


@dataclass(frozen=True)
class TensorRow:
    """One module of a family: its Hugging Face name, its slot, and the views of its weight (and bias).

    Two rows of one slot are two ways in which checkpoints store it: the first that is found is taken.

    Attributes:
        module: Name in the checkpoint; `{layer}` and `{n}` (number of the expert) are filled in.
        slot: Neutral name, see slots.py.
        shape: Shape of the weight that the config implies.
        views: The parts of the weight, in the order in which they are concatenated by rows in the output.
        bias: Whether the checkpoint may have a bias, which has the rows of the weight.
        tied_to: The module whose weight is used when this one is absent and the config ties the two.
        out: Shape of the output where it does not follow from the views.
        when: In which layers the module exists.
        weight: What follows the module's name in the name of the weight.
        bias_name: The same for the bias.
        part: "weight" or "bias": the part of the slot that the weight fills.
        stacked: Number of modules `{n}` that become one tensor with a new first axis.
        part_of: The parameter of all experts to which the module belongs in transformers.
    """

    module: str
    slot: str
    shape: Shape
    views: Views = copied
    bias: bool = False
    tied_to: str | None = None
    out: Shape | None = None
    when: When = _always
    weight: str = ".weight"
    bias_name: str = ".bias"
    part: str = "weight"
    stacked: Callable[[ModelConfig], int] | None = None
    part_of: FusedParameter | None = None

    def is_transposed_matrix(self, config: ModelConfig) -> bool:
        """Whether the weight is one matrix, and transposed on its way into the file."""
        if not any(self.when(config, layer) for layer in range(config.layers)):
            return False
        whole = [view.transpose for view in self.views(config)]
        return len(self.shape(config)) == 2 and all(take and take.size == take.count for take in whole)


@dataclass(frozen=True)
class GeneratedTensor:
    """A tensor computed from the config; None where the config does not ask for it."""

    slot: str
    compute: Callable[[ModelConfig], NDArray[np.float32] | None]


MetadataRow = tuple[str, Callable[[ModelConfig], Value | None]]


class Head(Enum):
    """What a GGUF reader of the family does with an output matrix that equals the embedding."""

    OPTIONAL = "left out when it equals the embedding"
    NEVER = "never read: the embedding is the head"
    ALWAYS = "always read, equal or not"


@dataclass(frozen=True)
class Family:
    """A model family: rows, no code.

    Attributes:
        name: The name that messages and docs use.
        hf: The `architectures` entries of config.json.
        gguf: The architecture's name in GGUF.
        tensors: The modules of a checkpoint and their slots.
        metadata: GGUF keys without the architecture's prefix, and how each is computed from the config.
        generated: Tensors that are computed from the config.
        requirements: Why a setting of the config cannot be exported, None where it can.
        notes: Remarks for the receipt on a model of this config.
        renames: Bring names of checkpoints and adapters to those of the rows: (pattern, replacement), applied in order.
        loaded_names: The names under which transformers loads tensors of a layout that it does not know: (pattern,
            replacement). Several tensors with one name are the transposed matrices, or the biases, of all experts.
        defaults: Values of fields that config.json omits, as in transformers.
        implied: Fields of config.json that llama.cpp assumes for the architecture, for a GGUF file as the base.
        gguf_biases: Slots whose bias llama.cpp reads where there is one, beside those of rows with `bias`.
        head: What GGUF readers do with an output matrix that equals the embedding.
        biased: Linear layers have biases, whatever config.json says.
        extra_layers: The checkpoint has layers behind the last (`num_nextn_predict_layers`), which are not exported.
        onnx: How the decoder differs from Llama's; None where edgetune draws no graph, so that ONNX takes torch.
        stored_names: Names in transformers' checkpoints where the rows have others, for a GGUF file as the base:
            (pattern, replacement), the inverse of `renames`.
        fused_experts: Whether transformers' checkpoints hold all experts of a layer in one tensor, for the same use.
        ignored: Patterns of tensors that old checkpoints carry and that hold nothing of the model.
        towers: Patterns of the modules of a multimodal model beside its text part. Their tensors are carried into a
            safetensors directory unchanged, and are in no other output; adapters may not change them.
    """

    name: str
    hf: tuple[str, ...]
    gguf: str
    tensors: tuple[TensorRow, ...]
    metadata: tuple[MetadataRow, ...]
    generated: tuple[GeneratedTensor, ...] = ()
    requirements: tuple[Requirement, ...] = ()
    notes: tuple[Requirement, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    loaded_names: tuple[tuple[str, str], ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    implied: Mapping[str, Any] = field(default_factory=dict)
    gguf_biases: tuple[str, ...] = ()
    head: Head = Head.OPTIONAL
    biased: bool = False
    extra_layers: bool = False
    onnx: Traits | None = None
    stored_names: tuple[tuple[str, str], ...] = ()
    fused_experts: bool = False
    ignored: tuple[str, ...] = (*ROTARY_BUFFERS, r".*\.attention\.masked_bias")
    towers: tuple[str, ...] = ()

    def is_beside_text(self, name: str) -> bool:
        """Whether a tensor or module belongs to a tower of a multimodal model."""
        return any(re.fullmatch(pattern, name) for pattern in self.towers)

    def stored_name(self, name: str) -> str:
        """Return the name of a tensor as transformers' checkpoints spell it."""
        for pattern, replacement in self.stored_names:
            name = re.sub(pattern, replacement, name)
        return name

    def is_buffer(self, name: str) -> bool:
        """Whether a tensor holds nothing of the model: transformers computes it."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    def is_behind_the_last(self, name: str, config: ModelConfig) -> bool:
        """Whether a tensor belongs to one of the `num_nextn_predict_layers` layers behind the last."""
        count = int(config.get("num_nextn_predict_layers", 0)) if self.extra_layers else 0
        layers = range(config.layers, config.layers + count)
        return any(name.startswith(f"model.layers.{layer}.") for layer in layers)

    def is_left_out(self, name: str, config: ModelConfig) -> bool:
        """Whether a tensor is in no output: a buffer, or of a layer behind the last."""
        return self.is_buffer(name) or self.is_behind_the_last(name, config)

    def with_bare_names(self, names: Collection[str]) -> Family:
        """Return the family for a checkpoint of the model without its head, whose names lack the first level.

        Transformers reads such names too. The family is the same if the names have that level.
        """
        trunk = [row.module for row in self.tensors if "{layer}" in row.module]
        prefix = trunk[0].partition(".")[0] + "."
        canonical = [self.canonical_name(name) for name in names]
        if not all(module.startswith(prefix) for module in trunk) or any(name.startswith(prefix) for name in canonical):
            return self
        heads = "|".join(re.escape(row.module) for row in self.tensors if not row.module.startswith(prefix))
        bare = (rf"^(?!{re.escape(prefix)}{f'|({heads})[.]' if heads else ''})", prefix)
        return replace(self, renames=(*self.renames, bare))

    def canonical_name(self, name: str) -> str:
        """Return the name of a tensor or module as the rows spell it."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def loaded_name(self, name: str) -> str:
        """Return the name of a tensor in the layout that transformers loads."""
        for pattern, replacement in self.loaded_names:
            name = re.sub(pattern, replacement, name)
        return name


@dataclass(frozen=True)
class ExpertSlice:
    """The rows of one expert, from `first` on, in a parameter of all experts, [experts, rows, columns].

    `transposed`: the parameter is [experts, columns, rows].
    """

    target: str
    shape: tuple[int, ...]
    number: int
    first: int
    transposed: bool = False


@dataclass(frozen=True)
class Piece:
    """Rows of an output tensor: a source tensor and its view.

    `target` is the name that an adapter uses; a tied head is read from the embedding, but has its own name.
    """

    target: str
    source: TensorInfo
    view: View = COPY
    part_of: ExpertSlice | None = None

    @property
    def stored_transposed(self) -> bool:
        """Whether the checkpoint stores the whole matrix transposed."""
        return self.view.transpose is not None and self.view.transpose.size == self.view.transpose.count

    @property
    def columns(self) -> int:
        """Columns of the source as a matrix; a vector is a column."""
        return self.source.shape[-1] if len(self.source.shape) > 1 else 1

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the piece."""
        return self.view.shape(math.prod(self.source.shape) // max(1, self.columns), self.columns)


@dataclass(frozen=True)
class BoundTensor:
    """A tensor of this model: its pieces, concatenated by rows. `layer` is None outside the blocks."""

    slot: str
    layer: int | None
    part: str
    pieces: tuple[Piece, ...]
    shape: tuple[int, ...]

    @property
    def gguf_name(self) -> str:
        """The name in a GGUF file."""
        return slots.gguf_name(self.slot, self.layer, self.part)


def bind(
    family: Family, config: ModelConfig, tensors: Mapping[str, TensorInfo], zero_biases: Collection[str] = ()
) -> list[BoundTensor]:
    """Match every tensor of a checkpoint with its row; `zero_biases` are left out where the model has no biases.

    Raises ArchitectureError with every tensor that is missing, unknown, of a wrong shape or of a wrong dtype.
    """
    problems = [text for check in family.requirements if (text := check(config))]
    if problems:
        raise ArchitectureError.of_many(f"settings of this {family.name} model that cannot be exported", problems)
    tensors = {
        name: info for name, info in tensors.items() if name not in zero_biases or _has_biases(family, config, name)
    }
    binder = _Binder(family, config, tensors, zero_biases)
    bound = binder.bind()
    if ignored := _ignored_biases(family, config, tensors):
        flag, name = ignored[0]
        raise ArchitectureError(
            f"config.json sets {flag}: false, or leaves it out, but {name} is stored ({len(ignored)} such biases), "
            "which transformers would ignore",
            f"Set {flag}: true in config.json if the model has these biases, or remove them from the weights",
        )
    if binder.problems:
        raise ArchitectureError.of_many(
            f"tensors that do not fit the {family.name} family",
            binder.problems,
            "Is config.json the one of these weights?",
        )
    return bound


def _ignored_biases(family: Family, config: ModelConfig, tensors: Collection[str]) -> list[tuple[str, str]]:
    """Return (field of config.json, tensor) of the biases of linear layers that the field switches off.

    The classes of `biased` families do not read these fields, others only those that have a default.
    """
    if family.biased:
        return []
    read = {field for name in family.hf for field in CLASS_DEFAULTS.get(name, SWITCHED_BIASES)}
    return [
        (flag, name)
        for flag, layers in SWITCHED_BIASES.items()
        if flag in read and config.get(flag) is False
        for name in tensors
        if layers.search(name) and not family.is_beside_text(name)
    ]


def _has_biases(family: Family, config: ModelConfig, name: str) -> bool:
    """Whether the model has a bias of this name, as far as the family and config.json say."""
    return family.biased or any(config.get(flag) and part in name for flag, part in _BIAS_FLAGS.items())


class _Binder:
    """One matching. Problems are collected, so that all are reported at once."""

    def __init__(
        self, family: Family, config: ModelConfig, tensors: Mapping[str, TensorInfo], spare: Collection[str]
    ) -> None:
        self._family = family
        self._spare = {family.canonical_name(name) for name in spare}
        self._config = config
        self._used: set[str] = set()
        self._tied = bool(config.get("tie_word_embeddings", False))
        self.problems: list[str] = []
        self._tensors: dict[str, TensorInfo] = {}
        for name, info in tensors.items():
            first = self._tensors.setdefault(family.canonical_name(name), info)
            if first is not info:
                self.problems.append(f"{first.name} and {name} are one tensor under two names")

    def bind(self) -> list[BoundTensor]:
        bound = [item for rows, layer in self._places() for item in self._slot(rows, layer)]
        known = self._used | self._spare
        unknown = [
            name
            for name in self._tensors
            if name not in known
            and not self._family.is_beside_text(name)
            and not self._family.is_left_out(name, self._config)
        ]
        self.problems += [f"{name} is not known in the {self._family.name} family" for name in sorted(unknown)]
        return bound

    def _places(self) -> Iterator[tuple[list[TensorRow], int | None]]:
        """Each slot with its rows, in each layer that has it."""
        by_slot: dict[tuple[str, str], list[TensorRow]] = {}
        for row in self._family.tensors:
            by_slot.setdefault((row.slot, row.part), []).append(row)
        for rows in by_slot.values():
            once = "{layer}" not in rows[0].module
            for layer in [None] if once else range(self._config.layers):
                if here := [row for row in rows if row.when(self._config, layer or 0)]:
                    yield here, layer

    def _slot(self, rows: list[TensorRow], layer: int | None) -> Iterator[BoundTensor]:
        row = next((row for row in rows if self._names(row, layer, row.weight)[0] in self._tensors), rows[0])
        for made in self._weight(row, layer):
            yield made
            if row.bias and self._names(row, layer, row.bias_name)[0] in self._tensors:
                yield from self._bias(row, layer, made.shape[:-1] or made.shape)

    def _names(self, row: TensorRow, layer: int | None, ending: str) -> list[str]:
        count = row.stacked(self._config) if row.stacked else 1
        return [row.module.format(layer=layer, n=number) + ending for number in range(count)]

    def _weight(self, row: TensorRow, layer: int | None) -> Iterator[BoundTensor]:
        names = self._names(row, layer, row.weight)
        sources = self._sources(names, None if row.tied_to is None else row.tied_to + row.weight)
        wanted = row.shape(self._config)
        fitting = [self._fits(source, wanted) for source in sources.values()]
        if len(sources) < len(names) or not all(fitting):
            return
        yield from self._made(row, layer, row.part, sources, [*row.views(self._config)], row.out)

    def _bias(self, row: TensorRow, layer: int | None, out: tuple[int, ...]) -> Iterator[BoundTensor]:
        sources = self._sources(self._names(row, layer, row.bias_name), None)
        views = row.views(self._config)
        shape = row.shape(self._config)
        transposed = any(view.transpose for view in views)
        wanted = (*shape[:-2], shape[-1]) if transposed else shape[:-1] or shape
        fitting = [self._fits(source, wanted) for source in sources.values()]
        if all(fitting):
            flat = {name: replace(info, shape=(math.prod(info.shape),)) for name, info in sources.items()}
            yield from self._made(row, layer, "bias", flat, [view.for_bias() for view in views], lambda config: out)

    def _sources(self, names: list[str], tied_to: str | None) -> dict[str, TensorInfo]:
        """The tensors of these names; a missing one is a problem unless it is tied."""
        found = {name: self._tensors[name] for name in names if name in self._tensors}
        if not found and tied_to in self._tensors and self._tied:
            found = {names[0]: self._tensors[tied_to]}
        self.problems += [f"{name} is missing" for name in names if name not in found]
        self._used.update(found)
        return found

    def _fits(self, source: TensorInfo, wanted: tuple[int, ...]) -> bool:
        """Whether a tensor has the shape that the config implies, and a dtype that is read."""
        before = len(self.problems)
        if source.shape != wanted:
            self.problems.append(
                f"{source.name} has the shape {list(source.shape)}, config.json asks for {list(wanted)}"
            )
        if source.dtype not in WEIGHT_DTYPES:
            self.problems.append(f"{source.name} is stored as {source.dtype}; {', '.join(WEIGHT_DTYPES)} are read")
        return len(self.problems) == before

    def _made(
        self,
        row: TensorRow,
        layer: int | None,
        part: str,
        sources: Mapping[str, TensorInfo],
        views: Sequence[View],
        out: Shape | None,
    ) -> Iterator[BoundTensor]:
        whole = row.part_of if part == row.part else None
        pieces = [
            Piece(name, info, view, _slab(whole, self._config, layer, number) if whole else None)
            for number, (name, info) in enumerate(sources.items())
            for view in views
        ]
        reasons = [f"{piece.source.name}: {text}" for piece in pieces if (text := _misfit(piece))]
        self.problems += reasons
        if reasons:
            return
        shape = out(self._config) if out else _shape(pieces, stacked=row.stacked is not None)
        held = sum(math.prod(piece.shape) for piece in pieces)
        if math.prod(shape) != held:
            self.problems.append(f"{pieces[0].source.name} gives {held} weights, {row.slot} has {list(shape)}")
            return
        yield BoundTensor(row.slot, layer, part, tuple(pieces), shape)


def targets(bound: Sequence[BoundTensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of everything an adapter can name: tensors, and the parameters of which they are parts."""
    pieces = [piece for item in bound for piece in item.pieces]
    found = {piece.part_of.target: piece.part_of.shape for piece in pieces if piece.part_of}
    return found | {piece.target: piece.source.shape for piece in pieces}


def stored_transposed(bound: Sequence[BoundTensor]) -> frozenset[str]:
    """Return the targets that the checkpoint stores transposed."""
    pieces = [piece for item in bound for piece in item.pieces]
    wholes = {piece.part_of.target for piece in pieces if piece.part_of and piece.part_of.transposed}
    return frozenset(wholes | {piece.target for piece in pieces if piece.stored_transposed})


def expert_slices(family: Family, config: ModelConfig) -> dict[str, tuple[ExpertSlice, tuple[int, ...]]]:
    """Return the modules of single experts that some checkpoints have: their place in the parameter of all experts,
    and the shape of their weight."""
    found: dict[str, tuple[ExpertSlice, tuple[int, ...]]] = {}
    for row in family.tensors:
        whole, stacked = row.part_of, row.stacked
        if whole is None or stacked is None:
            continue
        for layer in range(config.layers):
            for number in range(stacked(config) if row.when(config, layer) else 0):
                found[row.module.format(layer=layer, n=number)] = _slab(whole, config, layer, number), row.shape(config)
    return found


def _slab(whole: FusedParameter, config: ModelConfig, layer: int | None, number: int) -> ExpertSlice:
    name = whole.parameter.format(layer=layer)
    return ExpertSlice(name, whole.shape(config), number, whole.first(config), whole.transposed)


def _misfit(piece: Piece) -> str | None:
    return piece.view.problem(math.prod(piece.source.shape) // max(1, piece.columns), piece.columns)


def _shape(pieces: Sequence[Piece], *, stacked: bool) -> tuple[int, ...]:
    """The shape of an output tensor: that of its pieces, with the experts as first axis."""
    first = pieces[0].source.shape
    rows, columns = sum(piece.shape[0] for piece in pieces), pieces[0].shape[1]
    batch = (len({piece.source.name for piece in pieces}),) if stacked else first[:-2]
    whole = (rows // math.prod(batch), columns)
    return (*batch, *(whole if len(first) > 1 else whole[:1]))
