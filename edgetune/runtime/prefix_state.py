"""The prefix of an exported file: keys and values that a runtime puts before every text, read from beside the file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import RuntimeProblem
from edgetune_converters.errors import CheckpointError
from edgetune_converters.gguf import keys
from edgetune_converters.tensors import ALL

if TYPE_CHECKING:
    from edgetune_converters.reading.safetensors_file import SafetensorsFile

F32 = NDArray[np.float32]
_AGAIN = "Export the model again, or copy the file with the model"


class PrefixState:
    """Keys and values by layer, each f32 [heads, n, head_dim]."""

    def __init__(self, keys_by_layer: Sequence[F32], values_by_layer: Sequence[F32]) -> None:
        self.keys, self.values = list(keys_by_layer), list(values_by_layer)
        self.length: int = self.keys[0].shape[1]


def read_prefix(metadata: Mapping[str, Any], artifact: Path) -> PrefixState | None:
    """Return the prefix that lies beside an exported file or folder; None where its metadata state none.

    Raises:
        RuntimeProblem: It is missing, or is not the one that was written with the model.
    """
    text = metadata.get(keys.PREFIX_STATE)
    if text is None:
        return None
    from edgetune_converters.merging.prefix_state import path_beside  # takes longer than opening a small file
    from edgetune_converters.reading.safetensors_file import SafetensorsFile

    path = path_beside(artifact)
    try:
        stated = json.loads(text)
        wanted, tokens = str(stated["sha256"]), int(stated["tokens"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RuntimeProblem(f"{keys.PREFIX_STATE} of {artifact} cannot be read: {error}", _AGAIN) from None
    if not path.is_file():
        raise RuntimeProblem(
            f"{artifact} was trained with a prefix of {tokens} keys and values, and its file {path} is missing", _AGAIN
        )
    if hashlib.sha256(path.read_bytes()).hexdigest() != wanted:
        raise RuntimeProblem(f"{path} is not the prefix that was written with {artifact}", _AGAIN)
    try:
        file = SafetensorsFile(path)
        layers = range(len(file.tensors) // 2)
        each = [[_read(file, f"prefix.{layer}.{part}") for layer in layers] for part in ("key", "value")]
    except (CheckpointError, KeyError) as error:
        raise RuntimeProblem(f"{path} cannot be read: {error}", _AGAIN) from None
    return PrefixState(*each)


def _read(file: SafetensorsFile, name: str) -> F32:
    info = file.tensors[name]
    return file.rows(info, ALL).reshape(info.shape)
