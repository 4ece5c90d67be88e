"""What every method states: its options, as a section of the configuration, and the facts that others ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from edgetune.section import Section

ALL_LINEAR = "all-linear"

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


class Method(Section):
    """The trained change of the base: a PEFT method and its options."""

    facts: ClassVar[Facts]

    kind: str
    """The PEFT method."""

    def peft_options(self) -> dict[str, Any]:
        """Return the options under PEFT's names, for the class of its configuration."""
        raise NotImplementedError

    def trainable_in(self, rows: int, columns: int) -> int:
        """Return the number of parameters that are trained for an adapted linear layer of [rows, columns]."""
        raise NotImplementedError

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

    target_modules: str | list[str] = ALL_LINEAR
    """Adapted layers: `all-linear`, names such as [q_proj, v_proj], or a regular expression."""

    @property
    def names_layers(self) -> bool:
        """Whether the options name layers, which must be compared with those of the base."""
        return self.target_modules != ALL_LINEAR
