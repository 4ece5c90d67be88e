"""LoRA adapters of MLX, in the names and shapes of PEFT.

MLX adds scale * (x @ lora_a @ lora_b), with lora_a [columns, rank] and lora_b [rank, rows]: those of PEFT, transposed.
The scale is stated as such. Source: mlx-lm, tuner/lora.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.errors import AdapterError
from edgetune_converters.reading.safetensors_file import SafetensorsFile
from edgetune_converters.tensors import ALL, F32, RowIndex, TensorInfo

MLX_FILE = "adapters.safetensors"
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<role>[ab])")
_EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|wte|embed_in)")


def is_mlx(config: Mapping[str, Any]) -> bool:
    """Whether adapter_config.json is one of MLX."""
    return "peft_type" not in config and ("fine_tune_type" in config or "lora_parameters" in config)


def as_peft_config(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of PEFT for a configuration of MLX.

    Raises AdapterError for an adapter that is not LoRA, or without rank and scale.
    """
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise AdapterError(
            f"the adapter is of MLX's kind {kind!r}; only 'lora' can be merged",
            "Merge it with MLX, and give the result with --base: mlx_lm.fuse --model BASE --adapter-path DIR",
        )
    stated = config.get("lora_parameters")
    stated = stated if isinstance(stated, Mapping) else {}
    rank, scale = stated.get("rank"), stated.get("scale")
    if not isinstance(rank, int) or not isinstance(scale, (int, float)):
        raise AdapterError(
            f"{path}: lora_parameters has the rank {rank!r} and the scale {scale!r}", "Take the file from the training"
        )
    return {"peft_type": "LORA", "r": rank, "lora_alpha": rank * scale}


class MlxWeights:
    """The tensors of MLX's file under the names of PEFT, transposed when they are read.

    Raises CheckpointError for a damaged file, AdapterError for pairs of experts, which have another shape.
    """

    def __init__(self, path: Path) -> None:
        self._file = SafetensorsFile(path)
        self._stored: dict[str, TensorInfo] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in self._file.tensors.items():
            match = _FACTOR.fullmatch(name)
            if match is None:
                self.tensors[name] = info  # refused by its name
                continue
            if len(info.shape) != 2:
                raise AdapterError(
                    f"{name} has the shape {list(info.shape)}: pairs of experts from MLX cannot be merged yet",
                    "Merge it with MLX, and give the result with --base: mlx_lm.fuse --model BASE --adapter-path DIR",
                )
            role = match["role"].upper()
            embedding = _EMBEDDING.fullmatch(match["module"]) is not None
            own = f"{match['module']}.lora_embedding_{role}" if embedding else f"{match['module']}.lora_{role}.weight"
            self._stored[own] = info
            self.tensors[own] = replace(info, name=own, shape=info.shape[::-1])

    def rows(self, info: TensorInfo, rows: RowIndex, columns: RowIndex = ALL) -> F32:
        if info.name not in self._stored:
            return self._file.rows(info, rows, columns)
        return np.ascontiguousarray(self._file.rows(self._stored[info.name], ALL).T[rows][:, columns])

    def stored(self, info: TensorInfo, rows: RowIndex, columns: RowIndex = ALL) -> NDArray[Any]:
        return self.rows(info, rows, columns)

    def integers(self, info: TensorInfo) -> NDArray[np.int64]:
        return self._file.integers(info)

    def forget(self, info: TensorInfo, rows: RowIndex, columns: RowIndex = ALL) -> None:
        """Do nothing: the pairs are small."""
