"""The table of kinds of adapters: a row for each `peft_type` whose change of the base can be merged."""

from __future__ import annotations

from collections.abc import Mapping

from edgetune_converters.adapters.adalora import ADALORA
from edgetune_converters.adapters.banks import PVERA, RANDLORA, UNILORA, VBLORA
from edgetune_converters.adapters.blocks import C3A, GRALORA, MISS
from edgetune_converters.adapters.boft import BOFT
from edgetune_converters.adapters.hra import HRA
from edgetune_converters.adapters.ia3 import IA3
from edgetune_converters.adapters.lora import LORA
from edgetune_converters.adapters.lycoris import LOHA, LOKR
from edgetune_converters.adapters.matching import MERGE_FIRST, Kind
from edgetune_converters.adapters.normalized import BEFT, DELORA
from edgetune_converters.adapters.of_base import DEFT, GLORA, HIRA, PEANUT, ROAD
from edgetune_converters.adapters.oft import OFT
from edgetune_converters.adapters.peft_config import PeftConfig
from edgetune_converters.adapters.replacing import LN_TUNING, TRAINABLE_TOKENS
from edgetune_converters.adapters.sparse import SHIRA, SUPERTUNING
from edgetune_converters.adapters.spectra import FOURIERFT, WAVEFT
from edgetune_converters.adapters.vera import VERA
from edgetune_converters.adapters.whole_tensors import WHOLE_TENSORS
from edgetune_converters.errors import AdapterError, OnlyPeftError

KINDS: Mapping[str, Kind] = {
    "ADALORA": ADALORA,
    "BEFT": BEFT,
    "BOFT": BOFT,
    "C3A": C3A,
    "DEFT": DEFT,
    "DELORA": DELORA,
    "FOURIERFT": FOURIERFT,
    "GLORA": GLORA,
    "GRALORA": GRALORA,
    "HIRA": HIRA,
    "HRA": HRA,
    "IA3": IA3,
    "LN_TUNING": LN_TUNING,
    "LOHA": LOHA,
    "LOKR": LOKR,
    "LORA": LORA,
    "MISS": MISS,
    "OFT": OFT,
    "PEANUT": PEANUT,
    "PVERA": PVERA,
    "RANDLORA": RANDLORA,
    "ROAD": ROAD,
    "SHIRA": SHIRA,
    "SUPERTUNING": SUPERTUNING,
    "TRAINABLE_TOKENS": TRAINABLE_TOKENS,
    "UNILORA": UNILORA,
    "VBLORA": VBLORA,
    "VERA": VERA,
    "WAVEFT": WAVEFT,
    **WHOLE_TENSORS,
}
"""`peft_type` of adapter_config.json -> how adapters of this kind are merged."""

_BY_INPUT = "what it adds depends on the input, so that no weights equal it"
NOT_MERGEABLE: Mapping[str, str] = {
    "LILY": f"it mixes its matrices by the tokens of the text: {_BY_INPUT}",
    "POLY": f"it mixes its matrices by the number of the task: {_BY_INPUT}",
    "XLORA": f"it mixes its adapters by the text: {_BY_INPUT}",
    "SHADOW": f"it runs a second model beside the layers: {_BY_INPUT}",
}
"""`peft_type` -> why no weights equal the adapter."""

_SINGULAR = "it is made of the singular vectors of the base, whose signs depend on the library that computes them"
THROUGH_PEFT: Mapping[str, str] = {
    "ADAMSS": "it is made of clusters of the base's singular vectors, which are computed again when it is loaded",
    "FROD": "it is made of the base by solving a system of equations for each layer",
    "OSF": "it is made of all singular values of the base",
    "PSOFT": _SINGULAR,
    "TINYLORA": "which of its vectors belongs to a layer follows from the order of the layers in the model's class",
}
"""`peft_type` that PEFT alone merges -> why."""


def kind_of(config: PeftConfig) -> Kind:
    """Return the kind of an adapter. Raises AdapterError for an unknown kind, or a variant that cannot be merged."""
    stated = config.peft_type
    kind = KINDS.get(stated) if isinstance(stated, str) else None
    if isinstance(stated, str) and stated in NOT_MERGEABLE:
        raise AdapterError(
            f"the adapter is of the kind {stated}, which cannot be merged: {NOT_MERGEABLE[stated]}",
            "Run it with PEFT, or train an adapter of another kind",
        )
    if isinstance(stated, str) and stated in THROUGH_PEFT:
        raise OnlyPeftError(
            f"the adapter is of the kind {stated}, which PEFT alone merges: {THROUGH_PEFT[stated]}", MERGE_FIRST
        )
    if stated is None:
        raise AdapterError(
            "adapter_config.json states no peft_type, the kind of the adapter",
            "Take the file from the training again",
        )
    if kind is None:
        known = ", ".join(sorted({*KINDS, *THROUGH_PEFT}))
        raise AdapterError(
            f"the adapter is of the kind {stated}, which cannot be merged; known are {known}", MERGE_FIRST
        )
    kind.check_config(config)
    return kind
