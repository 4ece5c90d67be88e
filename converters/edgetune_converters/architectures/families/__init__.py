"""The table itself. Adding a family means adding rows here; nothing else asks which family a model is."""

from __future__ import annotations

from edgetune_converters.architectures.families import (
    deepseek,
    earlier,
    gemma,
    gpt_oss_llama4,
    lfm,
    llama,
    llama_variants,
    moe,
    phi,
)

FAMILIES = (
    *llama.FAMILIES,
    *gemma.FAMILIES,
    *phi.FAMILIES,
    *moe.FAMILIES,
    *deepseek.FAMILIES,
    *gpt_oss_llama4.FAMILIES,
    *earlier.FAMILIES,
    *lfm.FAMILIES,
    *llama_variants.FAMILIES,
)
