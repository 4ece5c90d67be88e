"""The methods of fine-tuning: which parameters are trained, and how they change the base.

To add a method: a module here with its options and facts, its class in METHODS, and, for the export, its fold in
`edgetune_converters.adapters`. Nothing here imports torch; `edgetune.training.adapters` makes the modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgetune.methods.adalora import AdaLora
from edgetune.methods.adaption_prompt import AdaptionPrompt
from edgetune.methods.base import ALL_LINEAR, Method
from edgetune.methods.beft import Beft
from edgetune.methods.bitfit import BitFit
from edgetune.methods.boft import Boft
from edgetune.methods.c3a import C3a
from edgetune.methods.deft import Deft
from edgetune.methods.delora import DeLora
from edgetune.methods.fourierft import FourierFt
from edgetune.methods.freeze import Freeze
from edgetune.methods.frod import Frod
from edgetune.methods.full import Full
from edgetune.methods.glora import GLora
from edgetune.methods.gralora import GraLora
from edgetune.methods.hira import HiRa
from edgetune.methods.hra import Hra
from edgetune.methods.ia3 import Ia3
from edgetune.methods.layernorm import LayerNorm
from edgetune.methods.llama_pro import LlamaPro
from edgetune.methods.loha import LoHa
from edgetune.methods.lokr import LoKr
from edgetune.methods.lora import Lora
from edgetune.methods.miss import MiSS
from edgetune.methods.multitask_prompt_tuning import MultitaskPromptTuning
from edgetune.methods.oft import Oft
from edgetune.methods.osf import Osf
from edgetune.methods.p_tuning import PTuning
from edgetune.methods.peanut import Peanut
from edgetune.methods.prefix_tuning import PrefixTuning
from edgetune.methods.prompt_tuning import PromptTuning
from edgetune.methods.psoft import Psoft
from edgetune.methods.pvera import Pvera
from edgetune.methods.randlora import RandLora
from edgetune.methods.road import Road
from edgetune.methods.shira import Shira
from edgetune.methods.supertuning import SuperTuning
from edgetune.methods.tinylora import TinyLora
from edgetune.methods.trainable_tokens import TrainableTokens
from edgetune.methods.unilora import UniLora
from edgetune.methods.vblora import VbLora
from edgetune.methods.vera import Vera
from edgetune.methods.waveft import WaveFt
from edgetune.section import kind_of, one_of

METHODS: dict[str, type[Method]] = {
    kind_of(method): method
    for method in (
        *(Lora, AdaLora, LoHa, LoKr, Vera, Pvera, RandLora, GraLora, VbLora, UniLora, TinyLora, HiRa, DeLora, GLora),
        *(Oft, Boft, Hra, Road, Psoft, MiSS, C3a, FourierFt, WaveFt, Frod, Deft, Peanut, Osf, Shira, SuperTuning),
        *(Ia3, Beft, BitFit, LayerNorm, TrainableTokens, Freeze, LlamaPro, Full),
        *(PromptTuning, PTuning, MultitaskPromptTuning, PrefixTuning, AdaptionPrompt),
    )
}
"""The methods by `adapter.kind`; the first is the default."""

NOT_TRAINED: Mapping[str, str] = {
    "xlora": "X-LoRA mixes adapters that are trained already, by a gate that looks at each input: no file can hold it",
    "poly": "Poly routes each task to its own mixture of adapters, and rows have no tasks here",
    "lily": "Lily mixes its factors by a router that looks at each input: no file can hold it",
    "cpt": "CPT trains the tokens of examples in the prompt; use a soft prompt",
    "cartridge": "CARTRIDGE trains a KV cache from PEFT's own prefill; use prefix tuning",
    "shadow": "SHADOW trains a second, small model beside the base, which no exported file has room for",
    "adamss": "AdaMSS clusters the base's singular vectors with scikit-learn, which edgetune does not install, "
    "whenever the adapter is loaded; one that was made elsewhere is exported",
    "kasa": "KaSA cuts singular values out of the base, with which the trained model is compared, and needs terms in "
    "the loss that PEFT does not add; an adapter made elsewhere is exported",
    "bone": "PEFT calls it MiSS today; use adapter.kind: miss",
    "mixed": "PEFT mixes adapters of several kinds for inference only; train them one after the other",
}
"""Kinds of PEFT that are not trained here -> the reason."""

NAMES_OF_OPTIONS: Mapping[str, str] = {
    "qlora": "QLoRA is adapter.kind: lora with quantization.bits: 4, the defaults",
    "rslora": "rsLoRA is adapter.kind: lora with adapter.use_rslora: true",
    "dora": "DoRA is adapter.kind: lora with adapter.use_dora: true",
    "qdora": "QDoRA is adapter.kind: lora with adapter.use_dora: true and quantization.bits: 4",
    "loraplus": "LoRA+ is adapter.kind: lora with adapter.loraplus_lr_ratio, such as 16",
    "lora+": "LoRA+ is adapter.kind: lora with adapter.loraplus_lr_ratio, such as 16",
    **{
        name: f"{name} is an initialization: adapter.kind: lora with adapter.init: {name}"
        for name in ("pissa", "olora", "corda", "lora_ga", "eva", "loftq")
    },
    "coft": "COFT is adapter.kind: oft with adapter.coft: true",
    "supra": "Supra is adapter.kind: supertuning with adapter.r",
    "para": "PaRa is adapter.kind: deft with adapter.para: true",
}
"""Names of methods that are options of a kind -> how to ask for them."""

if TYPE_CHECKING:
    AdapterConfig = Method
else:
    AdapterConfig = one_of(list(METHODS.values()))

__all__ = [
    "ALL_LINEAR",
    "METHODS",
    "NAMES_OF_OPTIONS",
    "NOT_TRAINED",
    "AdapterConfig",
    "BitFit",
    "Freeze",
    "Full",
    "Ia3",
    "LayerNorm",
    "LlamaPro",
    "Lora",
    "Method",
    "TrainableTokens",
]
