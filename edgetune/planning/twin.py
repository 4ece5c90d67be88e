"""A twin of a base with few layers: its own config.json with fewer blocks, and its own weights.

For loading by transformers, links to the files of the base suffice: tensors of further layers are not read. An export
reads every tensor of a checkpoint; for that, those of the first layers are copied.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgetune.planning.base_model import Base
from edgetune.planning.new_tokens import WEIGHTS
from edgetune_converters.errors import CheckpointError
from edgetune_converters.files.contents import read_json
from edgetune_converters.tensors import TensorInfo

_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
"""The number of a layer in the name of a tensor."""
_COPIED = 2**24
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


def copy_twin(base: Base, layers: int, folder: Path) -> Base:
    """Write a base with the first layers of another, and only their tensors, in one file.

    Args:
        base: A model directory for which `why_no_twin` is None.
        layers: The number of layers.
        folder: An empty directory.
    """
    for file in base.path.iterdir():
        if file.is_file() and not file.name.endswith((*WEIGHTS, ".index.json")) and file.name != "config.json":
            shutil.copyfile(file, folder / file.name)
    config = with_layers(read_json(base.path / "config.json"), layers)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    kept = [info for name, info in base.checkpoint.tensors.items() if _layer_of(name) < layers]
    _write_tensors(kept, folder / "model.safetensors")
    return Base(base.name, folder, base.revision, tokenizer=base.tokenizer)


def _layer_of(name: str) -> int:
    """Return the number of the layer of a tensor, -1 for one outside of the layers."""
    match = _BLOCK.search(name)
    return int(match[1]) if match else -1


def _write_tensors(tensors: Sequence[TensorInfo], path: Path) -> None:
    """Write tensors of other files as a safetensors file, byte by byte."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for info in tensors:
        header[info.name] = {
            "dtype": info.dtype, "shape": list(info.shape), "data_offsets": [end, end + info.bytes],
        }  # fmt: skip
        end += info.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for info in tensors:
            with info.file.open("rb") as source:
                source.seek(info.start)
                left = info.bytes
                while left:
                    part = source.read(min(left, _COPIED))
                    if not part:
                        raise CheckpointError(f"{info.file} ends inside {info.name}", "Fetch the file again")
                    out.write(part)
                    left -= len(part)


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
