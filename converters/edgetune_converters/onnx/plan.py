"""Plan the storage of each weight of a graph, before any weight is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edgetune_converters.errors import RecipeError
from edgetune_converters.onnx.layout import SourceTensor, Weight, group_weights
from edgetune_converters.onnx.storage import Floats, NBitsBlocks, StandardBlocks, Storage
from edgetune_converters.quantization.recipes import MAX_FALLBACK, PlannedTensor, Recipe, StoragePlan

_F32 = Floats("f32")
TABLE = "table"  # type of what is computed from the config; not a weight


@dataclass(frozen=True)
class OnnxRecipe:
    """A storage type of ONNX: the storage of matrices, of the head, and of slots with a storage of their own.

    `first_look`: storage of a coarse copy of a large head. It finds the best logits, and only those are computed with
    the head itself.
    """

    name: str
    matrices: Storage
    head: Storage
    slots: Mapping[str, Storage] = field(default_factory=dict)
    first_look: NBitsBlocks | None = None


# Measured on the sample and on a model of 1.2 B (docs/onnx.md): an error in the attention costs three times that of one
# in the feed-forward layer, key and value are few, and what is read for each token is what takes the time.
_ATTENTION = NBitsBlocks(4, 32, symmetric=False)
_FEW = NBitsBlocks(8, 128)
RECIPES: Mapping[str, OnnxRecipe] = {
    "f32": OnnxRecipe("f32", _F32, _F32),
    "f16": OnnxRecipe("f16", Floats("f16"), Floats("f16")),
    "int8": OnnxRecipe("int8", NBitsBlocks(8, 64), NBitsBlocks(8, 128)),
    "int4": OnnxRecipe(
        "int4",
        NBitsBlocks(4, 128, symmetric=False),
        NBitsBlocks(8, 128),
        {
            **dict.fromkeys(("attention_q", "attention_qkv", "attention_output"), _ATTENTION),
            **dict.fromkeys(("attention_k", "attention_v"), _FEW),
            **dict.fromkeys(("expert_gate", "expert_up", "expert_down"), NBitsBlocks(4, 32)),
        },
        first_look=NBitsBlocks(4, 128),
    ),
}
LARGE_VOCABULARY = 16_384  # at this size and above, a first look saves more than it costs
COARSE = "lm_head.coarse"


@dataclass(frozen=True)
class OnnxSettings:
    """Choices beside the storage type: weights per block, no zero points, standard operators only.

    `choices` are measured choices for slots of layers, each with its reason; `type_search` is the record
    of that measurement for the receipt. `apart`: query, key and value are separate products even where they are stored
    alike.
    """

    block: int | None = None
    symmetric: bool = False
    portable: bool = False
    choices: Mapping[tuple[str, int], tuple[NBitsBlocks, str]] = field(default_factory=dict)
    apart: bool = False
    type_search: Mapping[str, Any] | None = None


DEFAULT_SETTINGS = OnnxSettings()


@dataclass(frozen=True)
class OnnxPlan(StoragePlan):
    """A plan and, in the order of its rows, each weight with its storage; the rows of tables come last."""

    chosen: tuple[tuple[Weight, Storage], ...] = ()

    @property
    def _stored(self) -> tuple[PlannedTensor, ...]:
        return tuple(row for row in self.rows if row.type != TABLE)

    @property
    def weights(self) -> int:
        """Number of weights, without tables and copies."""
        return StoragePlan(self.recipe, tuple(row for row in self._stored if row.name != COARSE)).weights

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, scales and zero points included."""
        return sum(row.bytes for row in self._stored) * 8 / self.weights


def onnx_recipe(name: str) -> OnnxRecipe:
    """Return a storage type by name. Raises RecipeError that lists the names."""
    found = RECIPES.get(name.lower())
    if found is None:
        raise RecipeError(f"ONNX cannot be written as {name!r}", f"Give one of {', '.join(RECIPES)} with -q")
    return found


def plan(
    types: OnnxRecipe, sources: Sequence[SourceTensor], tables: Sequence[PlannedTensor], settings: OnnxSettings
) -> OnnxPlan:
    """Plan every weight. Tensors with the same input are stacked if their storage is equal."""
    tied = not any(source.slot[0] == "output" for source in sources)
    requested = {source: requested_storage(types, source, tied, settings) for source in sources}
    interleave = not settings.portable
    weights = group_weights(sources, lambda source: requested[source][0], interleave=interleave, apart=settings.apart)
    widths = {weight.shape[-1] for weight in weights if len(weight.shape) == 3}
    planned = [
        (weight, *_plan_weight(weight, *requested[weight.parts[0].source], settings, widths)) for weight in weights
    ]
    head = next(at for at, weight in enumerate(weights) if ("embedding" if tied else "output") in weight.slots)
    planned[head + 1 : head + 1] = _first_look(types, weights, weights[head], settings)
    rows = tuple(row for _, row, _ in planned)
    chosen = tuple((weight, storage) for weight, _, storage in planned)
    return OnnxPlan(Recipe(types.name, 0, types.name), (*rows, *tables), chosen)


def _first_look(
    types: OnnxRecipe, weights: Sequence[Weight], head: Weight, settings: OnnxSettings
) -> list[tuple[Weight, PlannedTensor, Storage]]:
    """Return the coarse copy of the head, if worthwhile. It follows the head, as both are written at the same time."""
    names = {weight.name for weight in weights}
    if types.first_look is None or settings.portable or "lm_head.bias" in names or head.shape[0] < LARGE_VOCABULARY:
        return []
    if not isinstance(fit_block(types.first_look, {head.shape[-1]}), NBitsBlocks):
        return []
    copy = replace(head, name=COARSE)
    size = sum(spec.bytes for spec in types.first_look.specs(copy.shape))
    kind, dtype = types.first_look.name, head.parts[0].source.dtype.lower()
    why = "a first look over the vocabulary; the best are then computed with the head itself"
    return [(copy, PlannedTensor(COARSE, copy.shape, dtype, kind, kind, why, size), types.first_look)]


def check_fallback(found: OnnxPlan) -> None:
    """Raise RecipeError if too many bytes cannot have the storage that the type asks for."""
    if found.fallback_share <= MAX_FALLBACK:
        return
    widths = sorted({row.shape[-1] for row in found.rows if row.fallback})
    raise RecipeError(
        f"{found.recipe.name} does not fit this model: {found.fallback_share:.0%} of the bytes would be stored as f16, "
        f"because rows of {_either(widths)} weights do not divide into blocks",
        f"Accept {found.bits_per_weight:.2f} bits per weight with --allow-fallback, or take f16",
    )


def _plan_weight(
    weight: Weight, requested: Storage, reason: str, settings: OnnxSettings, experts: Collection[int]
) -> tuple[PlannedTensor, Storage]:
    """Return the storage of a weight, as its rows allow."""
    chosen: Storage = requested
    if isinstance(requested, NBitsBlocks):
        widths = experts if len(weight.shape) == 3 else {weight.shape[-1]}
        why = _whole_rows(weight, settings)
        chosen = fit_block(requested, widths) if why else requested
        if chosen != requested:
            reason = f"rows of {_either(widths)} are not a multiple of {requested.block}, as {why} needs"
        if settings.portable and isinstance(chosen, NBitsBlocks):
            chosen = StandardBlocks(chosen.bits, chosen.block)
    size = sum(spec.bytes for spec in chosen.specs(weight.shape))
    dtype = weight.parts[0].source.dtype.lower()
    intended = requested if isinstance(chosen, Floats) else chosen  # a smaller block is not a fallback
    return PlannedTensor(weight.name, weight.shape, dtype, chosen.name, intended.name, reason, size), chosen


def requested_storage(
    types: OnnxRecipe, source: SourceTensor, tied: bool, settings: OnnxSettings
) -> tuple[Storage, str]:
    """Return the storage that the type asks for, and the reason."""
    slot, layer, part = source.slot
    if len(source.shape) < 2 or part != "weight" or slot.endswith("_norm"):
        return _F32, "vectors stay in f32"
    if slot in ("expert_router", "shared_router", "position_embedding"):
        return _F32, "small, and everything depends on it"
    if slot == "output" or (slot == "embedding" and tied):
        both = ", and the embedding is read from it" if slot == "embedding" else ""
        kept = _bits(types.head) != _bits(types.matrices)
        return types.head, ("the output matrix keeps more bits" if kept else "the recipe") + both
    if isinstance(types.matrices, NBitsBlocks) and layer is not None and (slot, layer) in settings.choices:
        return settings.choices[slot, layer]
    special = types.slots.get(slot)
    storage = types.matrices if special is None else special
    more = isinstance(storage, NBitsBlocks) and _bits(storage) != _bits(types.matrices)
    reason = "few weights, on which much depends" if more else "the recipe"
    return (_with_settings(storage, source, settings) if isinstance(storage, NBitsBlocks) else storage), reason


def _bits(storage: Storage) -> str:
    return storage.name.split("/")[0]


def _with_settings(requested: NBitsBlocks, source: SourceTensor, settings: OnnxSettings) -> NBitsBlocks:
    """Return the storage with the settings applied."""
    block = settings.block or requested.block
    looked_up = source.slot[0] == "embedding"
    bits: Any = 8 if settings.portable and looked_up else requested.bits  # no runtime has a lookup in 4 bits
    symmetric = requested.symmetric or settings.symmetric or settings.portable or looked_up
    return replace(requested, bits=bits, block=block, symmetric=symmetric)


def _whole_rows(weight: Weight, settings: OnnxSettings) -> str:
    """Return why rows must be multiples of the block; "" where they need not, as a product pads the last block."""
    if _is_looked_up(weight):
        return "a lookup"
    if len(weight.shape) == 3:
        return "the operator for experts"
    return "the standard operator" if settings.portable else ""


def _is_looked_up(weight: Weight) -> bool:
    return any(slot.endswith("embedding") for slot in weight.slots)


def _either(widths: Collection[int]) -> str:
    return " or ".join(str(width) for width in sorted(widths))


def fit_block(requested: NBitsBlocks, widths: Collection[int]) -> NBitsBlocks | Floats:
    """Return the largest block that divides all rows, or f16."""
    blocks = [block for block in (128, 64, 32, 16) if block <= requested.block]
    dividing = [block for block in blocks if all(width % block == 0 for width in widths)]
    return replace(requested, block=dividing[0]) if dividing else Floats("f16")
