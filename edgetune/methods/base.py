"""What every method states: its options, as a section of the configuration, and the facts that others ask for."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, model_validator

from edgetune.section import Section

Value = TypeVar("Value")
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Layers = Mapping[str, tuple[int, int]]
"""Names of linear layers -> [rows, columns] of their weights: outputs and inputs."""

ALL_LINEAR = "all-linear"
SLOTS_OF_PRESET: Mapping[str, tuple[str, ...]] = {
    "attention": (
        *("attention_qkv", "attention_q", "attention_k", "attention_v", "attention_output"),
        *("attention_q_a", "attention_q_b", "attention_kv_a", "attention_k_b", "attention_v_b"),
    ),
    "mlp": (
        *("ffn_gate", "ffn_up", "ffn_down", "expert_gate", "expert_up", "expert_down"),
        *("shared_gate", "shared_up", "shared_down"),
    ),
    "q_v": ("attention_qkv", "attention_q", "attention_v", "attention_q_b", "attention_v_b"),
    "v": ("attention_qkv", "attention_v", "attention_v_b"),
}
"""Names in `target_modules` that stand for layers of every family -> the slots of the architecture table."""

THROUGH_PEFT = "PEFT merges its layers, which are then stored whole"
"""`Facts.no_low_rank` of kinds that are merged by PEFT in the export."""

Taxonomy = Literal["reparametrized", "selective", "additive"]


@dataclass(frozen=True)
class Facts:
    """What is known of a method without its options."""

    title: str
    """The name in tables and messages, such as "LoRA"."""
    paper: str
    """arXiv number or another source."""
    taxonomy: Taxonomy
    """The branch of the PEFT family: a change computed from fewer numbers, chosen weights of the base, or new ones."""
    peft_type: str | None
    """PEFT's name of the kind of adapter; None: PEFT has none."""
    not_on: Mapping[int, str] = field(default_factory=dict)
    """`quantization.bits` that it cannot be trained on -> the reason."""
    not_as: Mapping[str, str] = field(default_factory=dict)
    """Export format -> the reason why it cannot be exported so."""
    no_low_rank: str | None = None
    """Why its change is no pair of low-rank matrices, so that gguf-lora needs `export.lora_rank`. None: it is."""


@dataclass(frozen=True)
class Surroundings:
    """What the rest of the configuration asks of a method."""

    bits: int
    """`quantization.bits`."""
    formats: tuple[str, ...]
    """`export.formats`."""
    merge_base: str
    """`export.merge_base`."""
    gradient_checkpointing: bool = False
    """`training.gradient_checkpointing`."""
    objective: str = "sft"
    """`objective.kind`."""
    lora_rank: int | None = None
    """`export.lora_rank`."""


def _as_yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _through_peft(kind: str | None) -> str | None:
    from edgetune_converters.adapters.kinds import THROUGH_PEFT

    return None if kind is None else THROUGH_PEFT.get(kind)


class Method(Section):
    """The trained change of the base: a PEFT method and its options."""

    facts: ClassVar[Facts]

    peft_names: ClassVar[Mapping[str, str]] = {}
    """Options that have another name in PEFT -> that name."""
    not_for_peft: ClassVar[frozenset[str]] = frozenset({"kind"})
    """Options that edgetune reads itself."""
    fixed_options: ClassVar[Mapping[str, Any]] = {}
    """Options of PEFT that have one value here."""
    used_with: ClassVar[Mapping[str, tuple[str, Any]]] = {}
    """Options that are read only if another option has a value -> that option and its value."""
    options_of_biases: ClassVar[tuple[str, ...]] = ()
    """Options that are read only if layers have biases."""
    starts_from_base: ClassVar[bool] = False
    """Whether a new adapter is computed from the weights of the base."""
    takes_transposed: ClassVar[bool] = True
    """Whether PEFT computes such an adapter for weights that are stored transposed (Conv1D of GPT-2)."""
    takes_checkpointing: ClassVar[bool] = True
    """Whether it can be trained with gradient checkpointing."""
    is_per_token: ClassVar[bool] = True
    """Whether it changes each token by itself, so that the rows of a batch may be computed as one row."""

    kind: str
    """The PEFT method."""

    @property
    def title(self) -> str:
        """The name of the method with its options."""
        return self.facts.title

    def peft_options(self) -> dict[str, Any]:
        """Return the options under PEFT's names, for the class of its configuration."""
        stated = self.model_dump(exclude=set(self.not_for_peft), exclude_none=True)
        return {**self.fixed_options, **{self.peft_names.get(name, name): value for name, value in stated.items()}}

    @abstractmethod
    def count_trainable(self, layers: Layers) -> int:
        """Return the number of parameters that are trained if these linear layers are adapted."""

    def count_of_biases(self, layers: Layers) -> int:
        """Return the number of parameters that are trained in addition if these layers have a bias."""
        return 0

    def count_frozen(self, layers: Layers) -> int:
        """Return the number of values that are stored with the adapter and not trained, such as projections."""
        return 0

    def why_not_as(self, format_: str) -> str | None:
        """Return why a trained model cannot be exported in a format; None if it can."""
        return self.facts.not_as.get(format_)

    @property
    def no_low_rank(self) -> str | None:
        """Why the change is no pair of low-rank matrices; None if it is."""
        return self.facts.no_low_rank

    def why_not_steps(self, steps: int) -> str | None:
        """Return why a training of so many optimizer steps cannot be; None if it can."""
        return None

    def contradictions(self) -> Iterator[str]:
        """Yield what contradicts one another among the options, each a sentence that says what to do."""
        yield from ()

    def unused_options(self) -> Iterator[str]:
        """Yield the options that have no effect beside the others, each a sentence that says what to do."""
        for option, (other, value) in self.used_with.items():
            # run.json states defaults too, so that a stated default is no contradiction
            if getattr(self, option) != type(self).model_fields[option].default and getattr(self, other) != value:
                yield (
                    f"adapter.{option} is {getattr(self, option)}, and adapter.{other}: {_as_yaml(value)} alone reads "
                    f"it; set that, or leave out adapter.{option}"
                )

    def conflicts(self, surroundings: Surroundings) -> Iterator[str]:
        """Yield what contradicts the rest of the configuration, each a sentence that says what to do."""
        yield from self.contradictions()
        title, bits = self.facts.title, surroundings.bits
        if bits in self.facts.not_on:
            others = " or ".join(str(each) for each in (4, 8, 16) if each not in self.facts.not_on)
            yield (
                f"adapter.kind: {self.kind} cannot be trained with quantization.bits: {bits}, as "
                f"{self.facts.not_on[bits]}; set quantization.bits: {others}"
            )
        for format_ in surroundings.formats:
            if why := self.why_not_as(format_):
                yield f"export.formats: {title} cannot be exported as {format_}: {why}; leave out {format_}"
            elif format_ == "gguf-lora" and self.no_low_rank and surroundings.lora_rank is None:
                yield (
                    f"export.formats: {title} is not exported as gguf-lora exactly: {self.no_low_rank}; approximate it "
                    "with export.lora_rank, or leave out gguf-lora"
                )
        if surroundings.merge_base != "original" and (why := _through_peft(self.facts.peft_type)):
            yield (
                f"export.merge_base is {surroundings.merge_base}, and PEFT alone merges {title}, into the base as it "
                f"is stored: {why}; set export.merge_base: original"
            )

    @property
    def reads_base(self) -> bool:
        """Whether a new adapter of these options is computed from the weights of the base."""
        return self.starts_from_base

    @property
    def names_layers(self) -> bool:
        """Whether the options name layers, which must be compared with those of the base."""
        return False

    @property
    def virtual_tokens(self) -> int:
        """Tokens of the context that the method takes before every text."""
        return 0


class LayerMethod(Method):
    """A method that adapts linear layers."""

    not_for_peft: ClassVar[frozenset[str]] = frozenset({"kind", "layers"})
    options_naming_layers: ClassVar[tuple[str, ...]] = ()
    """Options that name some of the adapted layers in a list."""

    target_modules: str | list[str] = ALL_LINEAR
    """Adapted layers: `all-linear`, `attention`, `mlp`, `q_v` or `v` of any family, names such as [q_proj, v_proj], or
    a regular expression for whole names. A fused matrix of query, key and value counts as each of them."""
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    """Adapt only these decoder layers, counted from 0."""
    modules_to_save: list[str] = []
    """Modules that are trained in full beside the adapter, such as [lm_head, embed_tokens]."""

    @model_validator(mode="after")
    def _keys_of_patterns_are_regular_expressions(self) -> Self:
        for option in type(self).model_fields:
            for key in getattr(self, option) if option.endswith("_pattern") else ():
                try:
                    re.compile(key)
                except re.error as error:
                    raise ValueError(f"adapter.{option}: {key!r} is no regular expression: {error}") from None
        return self

    def why_not_as(self, format_: str) -> str | None:
        """Return why a trained model cannot be exported in a format; None if it can."""
        if format_ == "gguf-lora" and self.modules_to_save:
            return "adapter.modules_to_save trains whole modules, which gguf-lora cannot hold"
        return super().why_not_as(format_)

    def peft_options(self) -> dict[str, Any]:
        """Return the options under PEFT's names, for the class of its configuration."""
        options = super().peft_options()
        if not self.modules_to_save:
            del options["modules_to_save"]
        return options

    def why_not_on(self, rows: int, columns: int) -> str | None:
        """Return why a linear layer of [rows, columns] cannot be adapted; None if it can, or PEFT says so itself."""
        return None

    @property
    def names_layers(self) -> bool:
        """Whether the options name layers, which must be compared with those of the base."""
        return bool(self.target_modules != ALL_LINEAR or self.layers is not None or self.modules_to_save)


class PerLayerMethod(LayerMethod):
    """A method whose parameters in a layer depend on the shape of the layer alone."""

    @abstractmethod
    def trainable_in(self, rows: int, columns: int) -> int:
        """Return the number of parameters that are trained for an adapted linear layer of [rows, columns]."""

    def count_trainable(self, layers: Layers) -> int:
        """Return the number of parameters that are trained if these linear layers are adapted."""
        return sum(self.trainable_in(rows, columns) for rows, columns in layers.values())

    def why_not_on(self, rows: int, columns: int) -> str | None:
        """Return why a linear layer of [rows, columns] cannot be adapted; None if it can, or PEFT says so itself."""
        return None if self.trainable_in(rows, columns) else "nothing of it would be trained"


def of_pattern(pattern: Mapping[str, Value], name: str, default: Value) -> Value:
    """Return the value of a `..._pattern` option for a layer: that of the first key that its name ends with."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)
