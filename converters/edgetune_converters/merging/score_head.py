"""The score head of a reward model: a vector whose product with the hidden state of the last token is the score.

It is written beside the network in f32: as metadata of a GGUF file, as an output of an ONNX graph, or as `score.weight`
of a class of transformers for sequence classification.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from edgetune_converters.architectures import Family, ModelConfig
from edgetune_converters.architectures.classifiers import classifier_of
from edgetune_converters.errors import AdapterError, ArchitectureError
from edgetune_converters.merging.stream import MakeBlock, RowBlock
from edgetune_converters.reading.checkpoint import Checkpoint
from edgetune_converters.reading.safetensors_file import SafetensorsFile
from edgetune_converters.tensors import F32

WEIGHT = "score.weight"
"""Name of the tensor, [1, hidden size], in the run and in transformers' classes."""
_HINT = "Train again, or take the file from a copy of the run"


@dataclass(frozen=True)
class ScoreHead:
    """A score head."""

    weight: F32
    """[hidden size]"""
    pad_id: int | None = None
    """Padding token of the training, by which transformers finds the last token of each row of a batch."""
    pad_token: str | None = None
    """Its text."""

    @classmethod
    def read(cls, path: Path, pad_id: int | None = None, pad_token: str | None = None) -> Self:
        """Read the head of a run.

        Raises:
            CheckpointError: The file is missing or damaged.
            AdapterError: It holds no score head of one row, or one that is not finite.
        """
        file = SafetensorsFile(path)
        info = file.tensors.get(WEIGHT)
        if info is None or len(info.shape) != 2 or info.shape[0] != 1:
            raise AdapterError(f"{path} has no {WEIGHT} of one row", _HINT)
        weight = file.rows(info, slice(None)).reshape(-1)
        if not np.isfinite(weight).all():
            raise AdapterError(f"{path}: {WEIGHT} has a value that is not a finite number", _HINT)
        return cls(weight, pad_id, pad_token)

    def check(self, format_: str, family: Family, config: ModelConfig) -> None:
        """Check that a format can hold the head of a model of this family.

        Raises:
            AdapterError: The head is that of another base.
            ArchitectureError: The format has no place for it.
        """
        if len(self.weight) != config.hidden:
            raise AdapterError(
                f"the score head has {len(self.weight)} values, and the hidden state of the base has {config.hidden}",
                "Was it trained on this base model?",
            )
        if why := why_no_place(format_, family, config):
            raise ArchitectureError(f"a reward model of {family.name} cannot be written so: {why}", _others(family))

    @property
    def text(self) -> str:
        """The head as metadata of GGUF: base64 of little-endian f32."""
        return base64.b64encode(self.weight.astype("<f4").tobytes()).decode()


def why_no_place(format_: str, family: Family, config: ModelConfig) -> str | None:
    """Return why a format has no place for a score head; None if it has one."""
    if format_ == "gguf-lora":
        return "gguf-lora has no place for the score head"
    if format_ == "onnx" and family.onnx is None:
        return "its ONNX graph is traced, and has no place for the score head"
    if format_ == "safetensors" and classifier_of(architecture_of(config.raw)) is None:
        return "transformers has no class for sequence classification of this family"
    return None


def _others(family: Family) -> str:
    return "Export GGUF" + (" or ONNX: --format gguf,onnx" if family.onnx else ": --format gguf")


def architecture_of(config: Mapping[str, Any]) -> str:
    """Return the class of transformers that a config.json names first; "" without one."""
    stated = config.get("architectures")
    return str(stated[0]) if isinstance(stated, list) and stated else ""


def classification_config(config: Mapping[str, Any], head: ScoreHead) -> dict[str, Any]:
    """Return the config.json of the model with its score head, for transformers' AutoModelForSequenceClassification."""
    label = "score"
    own: dict[str, Any] = {
        "architectures": [classifier_of(architecture_of(config))],
        "id2label": {"0": label},
        "label2id": {label: 0},
    }
    # transformers scores the last token that is not the padding token: a stop token would not be scored
    pad = {} if head.pad_id is None else {"pad_token_id": head.pad_id}
    text = config.get("text_config")
    return {**config, **own, **pad, **({"text_config": {**text, **pad}} if isinstance(text, Mapping) else {})}


@dataclass(frozen=True)
class ScoreTensor:
    """The score head as a tensor of the streaming pass, which reads nothing for it."""

    head: ScoreHead

    name = WEIGHT
    dtype = "F32"
    source_bytes = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as in NumPy."""
        return 1, len(self.head.weight)

    @property
    def sources(self) -> set[str]:
        """The base's tensors that it is made of: none."""
        return set()

    def pieces(self, checkpoint: Checkpoint) -> Iterator[MakeBlock]:
        """Yield the function that makes its one row."""
        yield lambda threads: RowBlock(self.head.weight[None])
