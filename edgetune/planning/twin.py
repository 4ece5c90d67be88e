"""A twin of a base with few layers: its own config.json with fewer blocks, beside links to the same weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgetune.planning.base_model import Base
from edgetune_converters.files.contents import read_json

_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def why_no_twin(base: Base) -> str | None:
    """Return why a base has no twin of few layers; None if it has one."""
    if base.checkpoint.is_packed:
        return "the weights of the base are packed, and are dequantized as a whole"
    if _count(base.checkpoint.config) is None:
        return "config.json does not state the number of layers"
    return None


def write_twin(base: Base, layers: int, folder: Path) -> Base:
    """Return a base with the first layers of another, whose files are links to those of the other.

    Args:
        base: A model directory for which `why_no_twin` is None.
        layers: The number of layers.
        folder: An empty directory.
    """
    for file in base.path.iterdir():
        if file.name != "config.json" and file.is_file():
            (folder / file.name).symlink_to(file.resolve())
    config = with_layers(read_json(base.path / "config.json"), layers)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Base(base.name, folder, base.revision, tokenizer=base.tokenizer)


def with_layers(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Return a config.json with another number of layers, and with lists of one value for each layer cut."""
    before = _count(config)
    inner = config.get("text_config")
    found = dict(config)
    if isinstance(inner, Mapping):
        found["text_config"] = with_layers(inner, layers)
    for key, value in config.items():
        if key in _COUNTS:
            found[key] = layers
        elif isinstance(value, list) and before is not None and len(value) == before:
            found[key] = value[:layers]
    return found


def _count(config: Mapping[str, Any]) -> int | None:
    stated = next((config[key] for key in _COUNTS if isinstance(config.get(key), int)), None)
    inner = config.get("text_config")
    return stated if stated is not None or not isinstance(inner, Mapping) else _count(inner)
