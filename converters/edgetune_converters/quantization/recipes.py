"""Recipes: the storage type of each tensor. A recipe is a file type of llama.cpp with the mix of llama-quantize.

Source: `llama_tensor_get_type_impl` and `tensor_type_fallback` in llama.cpp's src/llama-quant.cpp; a test compares with
the real quantizer. A mix is a table: slot -> rule. Rules get the position of a tensor among its kind.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from edgetune_converters.architectures import slots
from edgetune_converters.errors import RecipeError
from edgetune_converters.gguf.types import BY_NAME, StorageType
from edgetune_converters.quantization.overrides import NONE, Overrides

MAX_FALLBACK = 0.05  # share of the bytes past which an export refuses


@dataclass(frozen=True)
class MixPosition:
    """The position of a tensor: `index` among the `count` tensors of its kind."""

    index: int
    count: int
    heads_per_kv: int


Rule = Callable[[MixPosition], str | None]


def _always(name: str | None) -> Rule:
    return lambda place: name


def _first(count: int, name: str, rest: str | None = None) -> Rule:
    return lambda place: name if place.index < count else rest


def _first_part(share: int, name: str, rest: str | None = None) -> Rule:
    return lambda place: name if place.index < place.count // share else rest


def _never(place: MixPosition) -> str | None:
    return None


def _first_part_or(share: int, name: str, otherwise: Rule) -> Rule:
    return lambda place: name if place.index < place.count // share else otherwise(place)


def _grouped(name: str, otherwise: str | None = None) -> Rule:
    """For models with small value matrices, because four or more query heads share one."""
    return lambda place: name if place.heads_per_kv >= 4 else otherwise


def _more_bits(name: str) -> Rule:
    """The first and last eighth of the layers, and every third in between."""

    def rule(place: MixPosition) -> str | None:
        eighth = place.count // 8
        at_ends = place.index < eighth or place.index >= 7 * place.count // 8
        return name if at_ends or (place.index - eighth) % 3 == 2 else None

    return rule


V, K, DOWN, ATTENTION_OUTPUT = "attention_v", "attention_k", "ffn_down", "attention_output"

# slots that a mix treats alike -> their kind
_KINDS = {
    V: V, "attention_qkv": V, K: K, ATTENTION_OUTPUT: ATTENTION_OUTPUT,
    DOWN: DOWN, "expert_down": DOWN, "shared_down": DOWN,
}  # fmt: skip
# matrices that no recipe quantizes: small and critical
_KEPT = ("expert_router", "position_embedding", "convolution")


@dataclass(frozen=True)
class Recipe:
    """A file type: its number in `general.file_type`, the base storage type, and the slots that differ.

    `measured` are rules that apply instead where there is an importance matrix.
    """

    name: str
    file_type: int
    base: str
    mix: Mapping[str, Rule] = field(default_factory=dict)
    measured: Mapping[str, Rule] = field(default_factory=dict)


def _of(name: str, file_type: int, base: str, measured: Rule | None = None, **mix: Rule) -> Recipe:
    return Recipe(name, file_type, base, mix, {} if measured is None else {DOWN: measured})


_RECIPES = (
    _of("f32", 0, "f32"),
    _of("f16", 1, "f16"),
    _of("bf16", 32, "bf16"),
    _of("q8_0", 7, "q8_0"),
    _of("q4_0", 2, "q4_0", measured=_first_part(8, "q4_1")),
    _of("q4_1", 3, "q4_1"),
    _of("q5_0", 8, "q5_0", measured=_first_part(8, "q5_1")),
    _of("q5_1", 9, "q5_1"),
    _of("q2_k", 10, "q2_k",
        attention_v=_grouped("q4_k", "q3_k"), ffn_down=_always("q3_k"), attention_output=_always("q3_k")),
    _of("q3_k_s", 11, "q3_k"),
    _of("q3_k_m", 12, "q3_k",
        attention_v=_first(2, "q5_k", "q4_k"), ffn_down=_first_part(16, "q5_k", "q4_k"),
        attention_output=_always("q4_k")),
    _of("q3_k_l", 13, "q3_k",
        attention_v=_always("q5_k"), ffn_down=_always("q5_k"), attention_output=_always("q5_k")),
    _of("q4_k_s", 14, "q4_k", attention_v=_first(4, "q5_k"), ffn_down=_first_part(8, "q5_k")),
    _of("q4_k_m", 15, "q4_k", attention_v=_more_bits("q6_k"), ffn_down=_more_bits("q6_k")),
    _of("q5_k_s", 16, "q5_k"),
    _of("q5_k_m", 17, "q5_k", attention_v=_more_bits("q6_k"), ffn_down=_more_bits("q6_k")),
    _of("q6_k", 18, "q6_k"),
    _of("iq4_nl", 25, "iq4_nl", measured=_always(None), attention_v=_grouped("q5_k"), ffn_down=_first_part(8, "q5_k")),
    _of("iq4_xs", 30, "iq4_xs", measured=_always(None), attention_v=_grouped("q5_k"), ffn_down=_first_part(8, "q5_k")),
)  # fmt: skip

# llama-quantize spends more bits on small tensors of models with exactly eight experts: kind -> recipe -> type
_EIGHT_EXPERTS: Mapping[str, Mapping[str, str]] = {
    V: dict.fromkeys([recipe.name for recipe in _RECIPES], "q8_0"),
    K: dict.fromkeys([recipe.name for recipe in _RECIPES], "q8_0"),
    ATTENTION_OUTPUT: dict.fromkeys(["q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "iq4_nl", "iq4_xs"], "q5_k"),
}
# architectures with other mixes: architecture -> recipe -> kind -> rule
_OF_ARCHITECTURE: Mapping[str, Mapping[str, Mapping[str, Rule]]] = {
    "falcon": {
        "q2_k": {ATTENTION_OUTPUT: _never},
        "q3_k_m": {ATTENTION_OUTPUT: _never, DOWN: _first_part_or(16, "q5_k", _more_bits("q4_k"))},
        "q3_k_l": {ATTENTION_OUTPUT: _always("q4_k"), DOWN: _always("q4_k")},
        "q4_k_s": {DOWN: _never},
        "q4_k_m": {DOWN: _first_part_or(16, "q6_k", _more_bits("q5_k"))},
    }
}
_OUTPUT_OF_ARCHITECTURE = {"falcon": "q8_0"}
# architecture -> layers of its 70 B model, whose small value matrices get more bits
_LAYERS_OF_70B = {"llama": 80, "qwen2": 80}

RECIPES = {recipe.name: recipe for recipe in _RECIPES}
ALIASES = {"q4_k": "q4_k_m", "q5_k": "q5_k_m", "q3_k": "q3_k_m"}

_NOT_QUANTIZED = ("f32", "f16", "bf16")
# llama.cpp's fallback for rows that are no multiple of 256; f16 for rows that are no multiple of 32
_FALLBACK = {
    "q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "tq1_0": "q4_0", "tq2_0": "q4_0",
    "q2_0": "q4_0", "iq4_xs": "iq4_nl", "iq3_s": "iq4_nl", "iq3_xxs": "iq4_nl", "iq2_s": "iq4_nl", "iq2_xs": "iq4_nl",
    "iq2_xxs": "iq4_nl", "iq1_m": "iq4_nl", "iq1_s": "iq4_nl",
}  # fmt: skip


@dataclass(frozen=True)
class ModelFacts:
    """The properties of a model on which mixes depend."""

    layers: int
    heads: int
    kv_heads: int
    gguf: str
    experts: int = 0

    @property
    def heads_per_kv(self) -> int:
        """Query heads per key head in the first layer; 0 where that has no attention."""
        return self.heads // self.kv_heads if self.kv_heads else 0

    @property
    def is_70b(self) -> bool:
        """Whether the model is Llama 2 or 3 of 70 B or alike; Llama 1 of 65 B shares no key heads."""
        same = self.gguf == "llama" and self.heads == self.kv_heads
        return _LAYERS_OF_70B.get(self.gguf) == self.layers and not same


@dataclass(frozen=True)
class TensorFacts:
    """A tensor to be planned; `source` is its dtype in the checkpoint."""

    slot: str
    part: str
    layer: int | None
    name: str
    shape: tuple[int, ...]
    source: str


@dataclass(frozen=True)
class PlannedTensor:
    """The planned storage of one tensor. `wanted` differs from `type` where the rows do not fit the wanted type."""

    name: str
    shape: tuple[int, ...]
    source: str
    type: str
    wanted: str
    reason: str
    bytes: int

    @property
    def fallback(self) -> bool:
        """Whether the wanted type did not fit."""
        return self.type != self.wanted


@dataclass(frozen=True)
class StoragePlan:
    """A recipe applied to a model: exact sizes, known before any weight is read."""

    recipe: Recipe
    rows: tuple[PlannedTensor, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(row.bytes for row in self.rows)

    @property
    def weights(self) -> int:
        """The number of weights."""
        return sum(math.prod(row.shape) for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, over all tensors."""
        return self.bytes * 8 / self.weights

    @property
    def bytes_by_type(self) -> dict[str, int]:
        """Bytes in each storage type, the largest first."""
        totals: Counter[str] = Counter()
        for row in self.rows:
            totals[row.type] += row.bytes
        return dict(totals.most_common())

    @property
    def fallback_share(self) -> float:
        """The share of the bytes that is not stored in the wanted type."""
        return sum(row.bytes for row in self.rows if row.fallback) / self.bytes


def recipe_named(name: str) -> Recipe:
    """Return a recipe by name or alias, in upper or lower case. Raises RecipeError with the known names."""
    lower = name.lower()
    recipe = RECIPES.get(ALIASES.get(lower, lower))
    if recipe is None:
        raise RecipeError(f"{name!r} is not a storage type that can be written", f"Known: {', '.join(RECIPES)}")
    return recipe


def plan_storage(
    recipe: Recipe,
    tensors: Sequence[TensorFacts],
    model: ModelFacts,
    overrides: Overrides = NONE,
    measured: bool = False,
) -> StoragePlan:
    """Choose the storage type of every tensor; `measured`: there is an importance matrix.

    Raises RecipeError for an override that matches nothing.
    """
    names = [[tensor.name for tensor in tensors if (len(tensor.shape) > 1) is matrix] for matrix in (True, False)]
    overrides.check_matches(*names)
    tied = not any(tensor.slot == slots.OUTPUT for tensor in tensors)
    mix = {
        **recipe.mix,
        **(recipe.measured if measured else {}),
        **_OF_ARCHITECTURE.get(model.gguf, {}).get(recipe.name, {}),
    }
    counts = Counter(_kind(tensor) for tensor in tensors)
    decider = _Decider(replace(recipe, mix=mix), model, overrides, tied, counts)
    return StoragePlan(recipe, tuple(decider.row(tensor) for tensor in tensors))


def _kind(tensor: TensorFacts) -> str | None:
    return _KINDS.get(tensor.slot) if tensor.part == "weight" else None


def check_fallback(
    wanted: StoragePlan,
    tensors: Sequence[TensorFacts],
    model: ModelFacts,
    overrides: Overrides = NONE,
    measured: bool = False,
) -> None:
    """Raise RecipeError when more than 5 % of the bytes cannot have the wanted type."""
    if wanted.fallback_share <= MAX_FALLBACK:
        return
    plans = [plan_storage(recipe, tensors, model, overrides, measured) for recipe in RECIPES.values()]
    fitting = [other.recipe.name for other in plans if other.fallback_share <= MAX_FALLBACK]
    widths = sorted({row.shape[-1] for row in wanted.rows if row.fallback})
    raise RecipeError(
        f"{wanted.recipe.name} does not fit this model: {wanted.fallback_share:.0%} of the bytes would be stored in "
        f"other types ({_mix(wanted)}), because rows of {_list(widths)} weights do not divide into its blocks",
        f"Types that fit: {', '.join(fitting)}; or accept {wanted.bits_per_weight:.2f} bits per weight "
        "with --allow-fallback",
    )


def _mix(chosen: StoragePlan) -> str:
    return ", ".join(f"{size * 100 / chosen.bytes:.0f} % {name}" for name, size in chosen.bytes_by_type.items())


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(str(number) for number in numbers)


class _Decider:
    """Chooses the types of a model's tensors in the order of the file.

    As in llama-quantize, a mix counts only the tensors left to it: with an override on the value matrix of layer 0,
    that of layer 1 is the mix's first.
    """

    def __init__(
        self, recipe: Recipe, model: ModelFacts, overrides: Overrides, tied: bool, counts: Mapping[str | None, int]
    ) -> None:
        self._recipe = recipe
        self._model = model
        self._overrides = overrides
        self._tied = tied
        self._counts = counts
        self._seen: Counter[str] = Counter()  # tensors of each kind that were left to the mix, so far

    def row(self, tensor: TensorFacts) -> PlannedTensor:
        """Return the planned storage of one tensor."""
        wanted, reason = self._wanted(tensor)
        chosen = _fitting(wanted, tensor.shape[-1])
        if chosen != wanted:
            reason = f"rows of {tensor.shape[-1]} are no multiple of {BY_NAME[wanted].block}, which {wanted} needs"
        storage = BY_NAME[chosen]
        size = math.prod(tensor.shape[:-1]) * storage.row_bytes(tensor.shape[-1])
        return PlannedTensor(tensor.name, tensor.shape, tensor.source, chosen, wanted, reason, size)

    def _wanted(self, tensor: TensorFacts) -> tuple[str, str]:
        """The type for rows that fit, and why."""
        if len(tensor.shape) < 2 or tensor.part != "weight" or tensor.slot.endswith("_norm"):
            return "f32", "vectors stay in f32"
        if tensor.slot in _KEPT:
            return "f32", "small, and everything depends on it"
        override = self._overrides.find(tensor.slot, tensor.name, self._tied)
        if override is not None:
            return override.type, override.text
        if self._recipe.base in _NOT_QUANTIZED:
            return self._recipe.base, "the recipe"
        if tensor.slot == slots.OUTPUT or (self._tied and tensor.slot == slots.EMBEDDING):
            special = _OUTPUT_OF_ARCHITECTURE.get(self._model.gguf)
            kept = (special, "the output matrix keeps more bits") if special else None
            return kept or _output_type(self._recipe, tensor.shape[-1])
        kind = _kind(tensor)
        special = None if kind is None else self._special(tensor, kind)
        return (special, "the mix") if special else (self._recipe.base, "the recipe")

    def _special(self, tensor: TensorFacts, kind: str) -> str | None:
        """The type that the mix has for this tensor, None for the base type."""
        recipe, model = self._recipe, self._model
        place = self._place(tensor, kind)
        if model.experts == 8 and kind in _EIGHT_EXPERTS:
            return _EIGHT_EXPERTS[kind].get(recipe.name)
        special = recipe.mix[kind](place) if kind in recipe.mix else None
        if kind == V and model.is_70b and (special or recipe.base) in ("q3_k", "q4_k"):
            return "q5_k"
        return special

    def _place(self, tensor: TensorFacts, kind: str) -> MixPosition:
        """The position among its kind.

        Down matrices count as many as there are layers; with experts, their index is the layer's number, because a
        layer has several.
        """
        index, count = self._seen[kind], self._counts[kind]
        self._seen[kind] += 1
        if kind == DOWN:
            count = self._model.layers
            index = (tensor.layer or 0) if self._model.experts > 1 else index
        return MixPosition(index, count, self._model.heads_per_kv)


def _output_type(recipe: Recipe, width: int) -> tuple[str, str]:
    """q6_k, or q8_0 where the recipe has blocks of 32 and the rows do not divide by 256."""
    if recipe.base == "q8_0" or (BY_NAME[recipe.base].block == 32 and not _fits("q6_k", width)):
        return "q8_0", "the recipe" if recipe.base == "q8_0" else "the output matrix keeps more bits"
    return "q6_k", "the recipe" if recipe.base == "q6_k" else "the output matrix keeps more bits"


def _fitting(wanted: str, width: int) -> str:
    """`wanted`, or llama.cpp's fallback for this row length."""
    if _fits(wanted, width):
        return wanted
    replacement = _FALLBACK.get(wanted, wanted)
    return replacement if _fits(replacement, width) else "f16"


def _fits(name: str, width: int) -> bool:
    return width % BY_NAME[name].block == 0


def storage_of(row: PlannedTensor) -> StorageType:
    """Return the storage type of a planned tensor."""
    return BY_NAME[row.type]
