"""The table itself. Adding a family means adding rows here; nothing else asks which family a model is."""

from __future__ import annotations

from edgetune_converters.architectures.families import (
    deepseek,
    earlier,
    experts,
    gemma,
    lfm,
    llama,
    phi,
    relatives,
    turned_experts,
)

FAMILIES = (
    *llama.FAMILIES,
    *gemma.FAMILIES,
    *phi.FAMILIES,
    *experts.FAMILIES,
    *deepseek.FAMILIES,
    *turned_experts.FAMILIES,
    *earlier.FAMILIES,
    *lfm.FAMILIES,
    *relatives.FAMILIES,
)
