"""The score head of a reward model in a GGUF file, applied to the hidden state of the last token."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.runtime.llama.context import BATCH, LlamaContext
from edgetune_converters.errors import ArtifactError
from edgetune_converters.gguf import keys

F32 = NDArray[np.float32]


def read_score_head(metadata: Mapping[str, Any], width: int, path: Path) -> F32 | None:
    """Return the score head f32 [width] in the metadata of a file; None without one.

    Raises:
        ArtifactError: It is not `width` finite numbers.
    """
    stored = metadata.get(keys.SCORE_HEAD)
    if stored is None:
        return None
    try:
        head = np.frombuffer(base64.b64decode(str(stored), validate=True), "<f4")
    except (binascii.Error, ValueError):
        head = np.zeros(0, np.float32)
    if len(head) != width or not np.isfinite(head).all():
        raise ArtifactError(
            f"{path}: {keys.SCORE_HEAD} holds no score head of {width} numbers, the width of the model's hidden state",
            "The file is damaged: export it again",
        )
    return head


def score_row(context: LlamaContext, head: F32, ids: NDArray[np.int32]) -> float:
    """Return the score of a row; the context computes hidden states."""
    context.begin()
    for start in range(0, len(ids), BATCH):
        piece = ids[start : start + BATCH]
        context.decode(piece, start, np.ones(len(piece), np.int8))  # llama.cpp wants the states of all tokens
    return float(context.last_state(len(head)).astype(np.float64) @ head)
