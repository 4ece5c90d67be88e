"""The table of kinds of adapters: a row for each `peft_type` whose change of the base can be merged."""

from __future__ import annotations

from collections.abc import Mapping

from edgetune_converters.adapters.lora import LORA
from edgetune_converters.adapters.matching import MERGE_FIRST, Kind
from edgetune_converters.adapters.peft_config import PeftConfig
from edgetune_converters.errors import AdapterError

KINDS: Mapping[str, Kind] = {
    "LORA": LORA,
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
