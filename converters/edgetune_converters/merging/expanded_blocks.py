"""A base with more blocks than it has: copies of some are inserted, and a training has replaced them (LLaMA Pro)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgetune_converters.adapters.adapter import Adapter
from edgetune_converters.architectures import Family, ModelConfig
from edgetune_converters.errors import AdapterError
from edgetune_converters.reading.checkpoint import Checkpoint

BLOCKS = "blocks"
"""The field of adapter_config.json with the block of the base that each block is, or was copied from."""
# fields of config.json that give single blocks a property by their numbers, in another way than a list with an entry
# for each block -> the values that give all blocks the same
_NUMBERED: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("first_k_dense_replace", "num_kv_shared_layers", "num_nextn_predict_layers"), (0,)),
    **dict.fromkeys(("moe_layer_freq", "decoder_sparse_step", "interleave_moe_layer_step"), (1,)),
    **dict.fromkeys(("mlp_only_layers", "moe_layers"), ([],)),
}
# the same, unless a list (the second) gives it too
_NUMBERED_OR_LISTED: Mapping[str, str] = {
    "sliding_window_pattern": "layer_types",
    "full_attn_idxs": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
}


def why_not_expanded(family: Family, config: ModelConfig, sources: Sequence[int]) -> str | None:
    """Return why a model of this config.json cannot have the blocks `sources`, None if it can."""
    for field, same in _NUMBERED.items():
        value = config.get(field)
        if value is not None and value not in same:
            return f"config.json gives blocks a property by their numbers ({field}: {value!r})"
    for field, other in _NUMBERED_OR_LISTED.items():
        value = config.get(field)
        if value not in (None, 0) and config.get(other) is None:
            return f"config.json gives blocks a property by their numbers ({field}: {value!r})"
    if config.get("use_sliding_window") and config.get("layer_types") is None:
        return "config.json gives blocks a sliding window by their numbers (max_window_layers)"
    expanded = ModelConfig(with_blocks(config.raw, sources, config.layers))
    return next((reason for check in family.requirements if (reason := check(expanded))), None)


def expand(adapter: Adapter, family: Family, config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """Give the checkpoint the blocks that the adapter was trained with, and return its config.

    A new block has the tensors of the block that it was copied from until the changes of the adapter replace them.

    Raises:
        AdapterError: The adapter was trained on a base with another number of blocks, or one that cannot be expanded.
    """
    sources = adapter.config.raw.get(BLOCKS)
    if sources is None:
        return config
    if not _is_expansion(sources, config.layers):
        raise AdapterError(
            f"{adapter.config.path}: {BLOCKS} is {sources!r}, which is no expansion of the {config.layers} blocks of "
            "the base",
            "Was it trained on this base model?",
        )
    if reason := why_not_expanded(family, config, sources):
        raise AdapterError(
            f"the adapter {adapter.path} adds blocks, and {reason}", "Give the base that it was trained on"
        )
    checkpoint.renumber(_renumbered(family, sources))
    checkpoint.config = with_blocks(checkpoint.config, sources, config.layers)
    return ModelConfig(with_blocks(config.raw, sources, config.layers))


def new_number(sources: Sequence[int]) -> dict[int, int]:
    """Return the number that each block of the base has after the expansion."""
    return {source: sources.index(source) for source in sources}


def _is_expansion(sources: Any, count: int) -> bool:
    numbers = isinstance(sources, list) and all(type(number) is int for number in sources)
    return bool(numbers and sorted(sources) == sources and list(dict.fromkeys(sources)) == list(range(count)))


def renamed(family: Family, sources: Sequence[int] | None) -> Callable[[str], str]:
    """Return the function that maps the name of a tensor of the base to its name after the expansion."""
    if sources is None:
        return family.canonical_name
    numbers, pattern = new_number(sources), _block_pattern(family)

    def after(name: str) -> str:
        canonical = family.canonical_name(name)
        match = pattern.match(canonical)
        return canonical if match is None else f"{match[1]}{numbers[int(match[2])]}.{canonical[match.end() :]}"

    return after


def _renumbered(family: Family, sources: Sequence[int]) -> Callable[[str], list[str]]:
    """Return the function that maps the name of a tensor of the base to its names after the expansion."""
    pattern = _block_pattern(family)

    def names(name: str) -> list[str]:
        match = pattern.match(family.canonical_name(name))
        if match is None:
            return [name]
        own = re.compile(rf"(?<=\.){match[2]}(?=\.)")
        return [own.sub(str(number), name, count=1) for number, source in enumerate(sources) if source == int(match[2])]

    return names


def _block_pattern(family: Family) -> re.Pattern[str]:
    """The beginning of the names of the tensors of a block: its number is the second group."""
    starts = {row.module.partition("{layer}")[0] for row in family.tensors if "{layer}" in row.module}
    return re.compile(rf"({'|'.join(re.escape(start) for start in sorted(starts))})(\d+)\.")


def with_blocks(raw: Mapping[str, Any], sources: Sequence[int], before: int) -> dict[str, Any]:
    """Return config.json with the number of blocks, and with an entry for each block in its lists."""
    inner = raw.get("text_config")
    if isinstance(inner, Mapping):
        raw = {**raw, "text_config": with_blocks(inner, sources, before)}
    found: dict[str, Any] = {}
    for key, value in raw.items():
        is_count = key in ("num_hidden_layers", "n_layer", "n_layers") and value == before
        is_list = isinstance(value, list) and len(value) == before and key != "architectures"
        found[key] = len(sources) if is_count else [value[source] for source in sources] if is_list else value
    return found
