"""Layer-norm tuning: the norms are trained (arXiv:2312.11420)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from edgetune.methods.base import Facts, Layers, Method

ALL_NORMS = "all-norms"
# the names of norms in the decoders of transformers: input_layernorm, q_norm, norm_f, ln_1, ...
_NORM = r"(.*\.)?(\w*norm\w*|ln_\w+)"


class LayerNorm(Method):
    """Layer-norm tuning: the weights (and biases) of the norms are trained (arXiv:2312.11420)."""

    facts: ClassVar[Facts] = Facts(
        "layer-norm tuning", "arXiv:2312.11420", "selective", "LN_TUNING",
        not_as={"gguf-lora": "it replaces the weights of norms, which gguf-lora cannot hold"},
    )  # fmt: skip

    kind: Literal["layernorm"] = "layernorm"
    """The PEFT method."""
    target_modules: str | list[str] = ALL_NORMS
    """Trained norms: `all-norms`, names such as [input_layernorm], or a regular expression."""

    def contradictions(self) -> Iterator[str]:
        """Yield what contradicts one another among the options, each a sentence."""
        if not self.target_modules:
            yield f"adapter.target_modules is empty; name norms, or write {ALL_NORMS}"
        elif isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                yield f"adapter.target_modules: {self.target_modules!r} is no regular expression: {error}"

    def peft_options(self) -> dict[str, Any]:
        """Return the options under PEFT's names."""
        return {"target_modules": _NORM if self.target_modules == ALL_NORMS else self.target_modules}

    def count_trainable(self, layers: Layers) -> int:
        """Return the weights and the biases of a norm of the inputs of each layer: an upper bound."""
        return sum(2 * columns for _, columns in layers.values())

    @property
    def names_layers(self) -> bool:
        """Whether the options name layers, which must be compared with those of the base."""
        return True
