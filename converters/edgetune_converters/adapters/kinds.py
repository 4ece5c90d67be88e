"""The table of kinds of adapters: a row for each `peft_type` whose change of the base can be merged."""

from __future__ import annotations

from collections.abc import Mapping

from edgetune_converters.adapters.adalora import ADALORA
from edgetune_converters.adapters.boft import BOFT
from edgetune_converters.adapters.hra import HRA
from edgetune_converters.adapters.ia3 import IA3
from edgetune_converters.adapters.lora import LORA
from edgetune_converters.adapters.lycoris import LOHA, LOKR
from edgetune_converters.adapters.matching import MERGE_FIRST, Kind
from edgetune_converters.adapters.oft import OFT
from edgetune_converters.adapters.peft_config import PeftConfig
from edgetune_converters.adapters.replacing import LN_TUNING, TRAINABLE_TOKENS
from edgetune_converters.adapters.vera import VERA
from edgetune_converters.adapters.whole_tensors import WHOLE_TENSORS
from edgetune_converters.errors import AdapterError

KINDS: Mapping[str, Kind] = {
    "ADALORA": ADALORA,
    "BOFT": BOFT,
    "HRA": HRA,
    "IA3": IA3,
    "LN_TUNING": LN_TUNING,
    "LOHA": LOHA,
    "LOKR": LOKR,
    "LORA": LORA,
    "OFT": OFT,
    "TRAINABLE_TOKENS": TRAINABLE_TOKENS,
    "VERA": VERA,
    **WHOLE_TENSORS,
}
"""`peft_type` of adapter_config.json -> how adapters of this kind are merged."""


def kind_of(config: PeftConfig) -> Kind:
    """Return the kind of an adapter. Raises AdapterError for an unknown kind, or a variant that cannot be merged."""
    stated = config.peft_type
    kind = KINDS.get(stated) if isinstance(stated, str) else None
    if kind is None:
        raise AdapterError(
            f"the adapter is of the kind {stated}, which cannot be merged; known are {', '.join(sorted(KINDS))}",
            MERGE_FIRST,
        )
    kind.check_config(config)
    return kind
