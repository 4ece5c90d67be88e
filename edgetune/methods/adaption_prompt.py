"""LLaMA-Adapter: prompts in the upper layers, behind a gate that starts at zero (arXiv:2303.16199)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from edgetune.methods.base import Facts, Layers, Method

_OWN_SOFTMAX = (
    "its layers attend to the prompt in a softmax of its own and scale the result by a gate, an operation that the "
    "format's models do not have"
)


class AdaptionPrompt(Method):
    """LLaMA-Adapter: prompts in the upper layers, behind a gate that starts at zero (arXiv:2303.16199)."""

    facts: ClassVar[Facts] = Facts(
        "LLaMA-Adapter", "arXiv:2303.16199", "additive", "ADAPTION_PROMPT",
        not_as=dict.fromkeys(("gguf", "gguf-lora", "onnx", "safetensors"), _OWN_SOFTMAX),
    )  # fmt: skip

    is_per_token: ClassVar[bool] = False

    kind: Literal["adaption-prompt"] = "adaption-prompt"
    """The PEFT method."""
    tokens: Annotated[int, Field(ge=1)] = 10
    """Prompt tokens of each adapted layer."""
    upper_layers: Annotated[int, Field(ge=1)] = 8
    """Number of adapted layers, counted from the last."""

    def peft_options(self) -> dict[str, Any]:
        """Return the options under PEFT's names."""
        return {"adapter_len": self.tokens, "adapter_layers": self.upper_layers}

    def count_trainable(self, layers: Layers) -> int:
        """Return 0: no linear layer of the base is adapted."""
        return 0
