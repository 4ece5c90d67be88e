"""Which storage type each tensor gets. A recipe is a file type of llama.cpp with the same mix as llama-quantize.

Facts taken from `llama_tensor_get_type_impl` and `tensor_type_fallback` in llama.cpp's src/llama-quant.cpp, compared
with the real quantizer by a test. A mix is a table: slot -> rule. Rules see the number of the tensor among its kind.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from edgetune_converters.architectures import slots
from edgetune_converters.errors import RecipeError
from edgetune_converters.gguf.types import BY_NAME, StorageType

MAX_FALLBACK = 0.05  # share of the bytes past which an export refuses


@dataclass(frozen=True)
class Place:
    """Where in the model a tensor stands: `index` is its number among the `layers` blocks."""

    index: int
    layers: int
    heads_per_kv: int


Rule = Callable[[Place], str | None]


def _always(name: str) -> Rule:
    return lambda place: name


def _first(count: int, name: str, rest: str | None = None) -> Rule:
    return lambda place: name if place.index < count else rest


def _first_part(share: int, name: str, rest: str | None = None) -> Rule:
    return lambda place: name if place.index < place.layers // share else rest


def _grouped(name: str, otherwise: str | None = None) -> Rule:
    """For models whose value matrices are small because four or more query heads share one."""
    return lambda place: name if place.heads_per_kv >= 4 else otherwise


def _more_bits(name: str) -> Rule:
    """The first and last eighth of the layers, and every third between."""

    def rule(place: Place) -> str | None:
        eighth = place.layers // 8
        at_ends = place.index < eighth or place.index >= 7 * place.layers // 8
        return name if at_ends or (place.index - eighth) % 3 == 2 else None

    return rule


V, DOWN, ATTENTION_OUTPUT = "attention_v", "ffn_down", "attention_output"


@dataclass(frozen=True)
class Recipe:
    """A file type: its number in `general.file_type`, the usual storage type, and the slots that differ."""

    name: str
    file_type: int
    base: str
    mix: Mapping[str, Rule] = field(default_factory=dict)


def _of(name: str, file_type: int, base: str, **mix: Rule) -> Recipe:
    return Recipe(name, file_type, base, mix)


_RECIPES = (
    _of("f32", 0, "f32"),
    _of("f16", 1, "f16"),
    _of("bf16", 32, "bf16"),
    _of("q8_0", 7, "q8_0"),
    _of("q4_0", 2, "q4_0"),
    _of("q4_1", 3, "q4_1"),
    _of("q5_0", 8, "q5_0"),
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
    _of("iq4_nl", 25, "iq4_nl", attention_v=_grouped("q5_k"), ffn_down=_first_part(8, "q5_k")),
    _of("iq4_xs", 30, "iq4_xs", attention_v=_grouped("q5_k"), ffn_down=_first_part(8, "q5_k")),
)  # fmt: skip

RECIPES = {recipe.name: recipe for recipe in _RECIPES}
ALIASES = {"q4_k": "q4_k_m", "q5_k": "q5_k_m", "q3_k": "q3_k_m"}

_NOT_QUANTIZED = ("f32", "f16", "bf16")
# what llama.cpp takes for rows that are no multiple of 256; then, for rows that are no multiple of 32, f16
_FALLBACK = {"iq4_xs": "iq4_nl", "q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


@dataclass(frozen=True)
class Shape:
    """The facts about a model on which mixes depend."""

    layers: int
    heads: int
    kv_heads: int
    gguf: str

    @property
    def is_llama_70b(self) -> bool:
        """Llama 2 and 3 of 70 B: their small value matrices get more bits."""
        return self.gguf == "llama" and self.layers == 80 and self.heads != self.kv_heads


@dataclass(frozen=True)
class Tensor:
    """A tensor to be planned; `source` is the dtype in the checkpoint."""

    slot: str
    part: str
    layer: int | None
    name: str
    shape: tuple[int, ...]
    source: str


@dataclass(frozen=True)
class Row:
    """The decision about one tensor. `wanted` differs from `type` where the rows do not fit the wanted type."""

    name: str
    shape: tuple[int, ...]
    source: str
    type: str
    wanted: str
    reason: str
    bytes: int

    @property
    def fallback(self) -> bool:
        """Whether the recipe's type did not fit."""
        return self.type != self.wanted


@dataclass(frozen=True)
class Plan:
    """A recipe applied to a model: the real size, known before any weight is read."""

    recipe: Recipe
    rows: tuple[Row, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(row.bytes for row in self.rows)

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(math.prod(row.shape) for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Real bits per weight over all tensors."""
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
        """Share of the bytes that could not be stored in the type that the recipe asks for."""
        return sum(row.bytes for row in self.rows if row.fallback) / self.bytes


def recipe_named(name: str) -> Recipe:
    """A recipe by name or alias, upper or lower case. Errors: RecipeError listing the names."""
    lower = name.lower()
    recipe = RECIPES.get(ALIASES.get(lower, lower))
    if recipe is None:
        raise RecipeError(f"{name!r} is not a storage type that can be written", f"Known: {', '.join(RECIPES)}")
    return recipe


def plan(recipe: Recipe, tensors: Sequence[Tensor], model: Shape) -> Plan:
    """Decide about every tensor."""
    tied = not any(tensor.slot == slots.OUTPUT for tensor in tensors)
    return Plan(recipe, tuple(_row(recipe, tensor, model, tied) for tensor in tensors))


def check_fallback(wanted: Plan, tensors: Sequence[Tensor], model: Shape) -> None:
    """Errors: RecipeError when more than 5 % of the bytes cannot have the type they were meant to have."""
    if wanted.fallback_share <= MAX_FALLBACK:
        return
    fitting = [name for name in RECIPES if plan(RECIPES[name], tensors, model).fallback_share <= MAX_FALLBACK]
    widths = sorted({row.shape[-1] for row in wanted.rows if row.fallback})
    raise RecipeError(
        f"{wanted.recipe.name} does not fit this model: {wanted.fallback_share:.0%} of the bytes would be stored in "
        f"other types ({_mix(wanted)}), because rows of {_list(widths)} weights do not divide into its blocks",
        f"Types that fit: {', '.join(fitting)}; or accept {wanted.bits_per_weight:.2f} bits per weight "
        "with --allow-fallback",
    )


def _mix(chosen: Plan) -> str:
    return ", ".join(f"{size * 100 / chosen.bytes:.0f} % {name}" for name, size in chosen.bytes_by_type.items())


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(str(number) for number in numbers)


def _row(recipe: Recipe, tensor: Tensor, model: Shape, tied: bool) -> Row:
    wanted, reason = _wanted(recipe, tensor, model, tied)
    chosen = _fitting(wanted, tensor.shape[-1])
    if chosen != wanted:
        reason = f"rows of {tensor.shape[-1]} are no multiple of {BY_NAME[wanted].block}, which {wanted} needs"
    storage = BY_NAME[chosen]
    size = math.prod(tensor.shape[:-1]) * storage.row_bytes(tensor.shape[-1])
    return Row(tensor.name, tensor.shape, tensor.source, chosen, wanted, reason, size)


def _wanted(recipe: Recipe, tensor: Tensor, model: Shape, tied: bool) -> tuple[str, str]:
    """The type that the mix gives when all rows fit, and why."""
    if len(tensor.shape) < 2:
        return "f32", "vectors stay in f32"
    if recipe.base in _NOT_QUANTIZED:
        return recipe.base, "the recipe"
    if tensor.slot == slots.OUTPUT or (tied and tensor.slot == slots.EMBEDDING):
        return _output_type(recipe, tensor.shape[-1])
    rule = recipe.mix.get(tensor.slot)
    place = Place(tensor.layer or 0, model.layers, model.heads // model.kv_heads)
    special = rule(place) if rule else None
    if tensor.slot == V and model.is_llama_70b and (special or recipe.base) in ("q3_k", "q4_k"):
        special = "q5_k"
    return (special, "the mix") if special else (recipe.base, "the recipe")


def _output_type(recipe: Recipe, width: int) -> tuple[str, str]:
    """q6_k, or q8_0 where the recipe is of blocks of 32 and promises nothing that needs 256."""
    if recipe.base == "q8_0" or (BY_NAME[recipe.base].block == 32 and not _fits("q6_k", width)):
        return "q8_0", "the recipe" if recipe.base == "q8_0" else "the output matrix keeps more bits"
    return "q6_k", "the recipe" if recipe.base == "q6_k" else "the output matrix keeps more bits"


def _fitting(wanted: str, width: int) -> str:
    """`wanted`, or what llama.cpp falls back to for this row length."""
    if _fits(wanted, width):
        return wanted
    replacement = _FALLBACK.get(wanted, wanted)
    return replacement if _fits(replacement, width) else "f16"


def _fits(name: str, width: int) -> bool:
    return width % BY_NAME[name].block == 0


def storage_of(row: Row) -> StorageType:
    """The storage type of a planned tensor."""
    return BY_NAME[row.type]
