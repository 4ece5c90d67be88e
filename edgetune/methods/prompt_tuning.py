"""Prompt tuning: virtual tokens before every text (arXiv:2104.08691)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from edgetune.methods.base import Facts
from edgetune.methods.virtual_tokens import NO_LORA, VirtualTokenMethod


class PromptTuning(VirtualTokenMethod):
    """Prompt tuning: trained vectors before the embeddings of every text (arXiv:2104.08691)."""

    facts: ClassVar[Facts] = Facts(
        "prompt tuning", "arXiv:2104.08691", "additive", "PROMPT_TUNING", not_as=NO_LORA
    )  # fmt: skip

    kind: Literal["prompt-tuning"] = "prompt-tuning"
    """The PEFT method."""

    init: Literal["vocabulary", "random", "text"] = "vocabulary"
    """Start from the embeddings of random tokens, from random vectors, or from the tokens of `init_text`."""
    init_text: str | None = None
    """Text whose embeddings the virtual tokens start from, repeated or cut to their number."""

    def contradictions(self) -> Iterator[str]:
        """Yield what contradicts one another among the options, each a sentence."""
        if (self.init == "text") is not bool((self.init_text or "").strip()):
            yield "give adapter.init: text and adapter.init_text together, or neither"

    def peft_options(self) -> dict[str, Any]:
        """Return the options under PEFT's names; a text is set after the model is made."""
        start = "SAMPLE_VOCAB" if self.init == "vocabulary" else "RANDOM"
        return {**super().peft_options(), "prompt_tuning_init": start}
