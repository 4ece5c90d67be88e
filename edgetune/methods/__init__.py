"""The methods of fine-tuning: which parameters are trained, and how they change the base.

To add a method: a module here with its options and facts, its class in METHODS, and, for the export, its fold in
`edgetune_converters.adapters`. Nothing here imports torch; `edgetune.training.adapters` makes the modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgetune.methods.adaption_prompt import AdaptionPrompt
from edgetune.methods.base import ALL_LINEAR, Method
from edgetune.methods.bitfit import BitFit
from edgetune.methods.freeze import Freeze
from edgetune.methods.full import Full
from edgetune.methods.ia3 import Ia3
from edgetune.methods.layernorm import LayerNorm
from edgetune.methods.llama_pro import LlamaPro
from edgetune.methods.lora import Lora
from edgetune.methods.multitask_prompt_tuning import MultitaskPromptTuning
from edgetune.methods.p_tuning import PTuning
from edgetune.methods.prefix_tuning import PrefixTuning
from edgetune.methods.prompt_tuning import PromptTuning
from edgetune.section import kind_of, one_of

_OF_VIRTUAL_TOKENS = (PromptTuning, PTuning, MultitaskPromptTuning, PrefixTuning, AdaptionPrompt)
METHODS: dict[str, type[Method]] = {
    kind_of(method): method for method in (Lora, Ia3, BitFit, LayerNorm, Freeze, LlamaPro, Full, *_OF_VIRTUAL_TOKENS)
}
"""The methods by `adapter.kind`; the first is the default."""

if TYPE_CHECKING:
    AdapterConfig = Method
else:
    AdapterConfig = one_of(list(METHODS.values()))

__all__ = [
    "ALL_LINEAR",
    "METHODS",
    "AdapterConfig",
    "BitFit",
    "Freeze",
    "Full",
    "Ia3",
    "LayerNorm",
    "LlamaPro",
    "Lora",
    "Method",
]
