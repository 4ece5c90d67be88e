"""The closed set of things that can happen to a tensor on its way: each says which source rows make an output row.

Working on row numbers keeps the stream in blocks: base and delta are gathered with the same index, nothing is moved in
memory twice, and the storage type never matters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.architectures.config import ModelConfig
from edgetune_converters.checkpoint import Rows

Operation = Callable[[int, int, int], Rows]


def copy(first: int, last: int, head_dim: int) -> Rows:
    """Rows as they are."""
    return slice(first, last)


def rope_permute(first: int, last: int, head_dim: int) -> Rows:
    """Hugging Face keeps the two halves of a rotated pair half a head apart; llama.cpp's "llama" wants them adjacent.

    Output row 2*i+p of a head is source row p*head_dim/2+i of it.
    """
    row = np.arange(first, last)
    head, inside = np.divmod(row, head_dim)
    pair, half = np.divmod(inside, 2)
    source: NDArray[np.intp] = head * head_dim + half * (head_dim // 2) + pair
    return source


OPERATIONS: Mapping[str, Operation] = {"copy": copy, "rope_permute": rope_permute}


def check(operation: str, rows: int, config: ModelConfig) -> str | None:
    """Why `operation` cannot be done on a tensor of so many rows, or None."""
    if operation == "rope_permute" and (config.head_dim % 2 or rows % config.head_dim):
        return f"{rows} rows are not whole heads of an even size ({config.head_dim})"
    return None
