"""The linear layers of a model by name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

MATRICES = (torch.nn.Linear, Conv1D)
"""The kinds of linear layers that adapters change."""


def linear_layer_names(model: Any, excluded: str | None = None) -> list[str]:
    """List the last parts of the names of the linear layers that can be adapted, without those of `excluded`."""
    head = model.get_output_embeddings()
    linear = (name for name, module in linear_layers(model, excluded, MATRICES) if module is not head)
    return list(dict.fromkeys(name.rpartition(".")[2] for name in linear))


def linear_layers(
    model: Any, excluded: str | None, kinds: tuple[type, ...] = (torch.nn.Linear,)
) -> Iterator[tuple[str, Any]]:
    """Yield the linear layers by name, without those that match `excluded`."""
    for name, module in model.named_modules():
        if isinstance(module, kinds) and not (excluded and re.fullmatch(excluded, name)):
            yield name, module


def has_rounded_layers(model: Any) -> bool:
    """Whether bitsandbytes rounds a layer of the model: a linear layer beside the head."""
    head = model.get_output_embeddings()
    return any(module is not head for _, module in linear_layers(model, None))
