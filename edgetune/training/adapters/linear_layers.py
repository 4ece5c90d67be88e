"""The linear layers of a model by name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch


def linear_layer_names(model: Any, excluded: str | None = None) -> list[str]:
    """List the last parts of the names of the linear layers that can be adapted, without those of `excluded`."""
    head = model.get_output_embeddings()
    linear = (name for name, module in linear_layers(model, excluded) if module is not head)
    return list(dict.fromkeys(name.rpartition(".")[2] for name in linear))


def linear_layers(model: Any, excluded: str | None) -> Iterator[tuple[str, Any]]:
    """Yield the linear layers by name, without those that match `excluded`."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not (excluded and re.fullmatch(excluded, name)):
            yield name, module
