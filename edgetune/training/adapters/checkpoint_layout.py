"""Tensors of a transformers model in the layout of its checkpoint, where the two differ, as for stacked experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

Tensors = Mapping[str, torch.Tensor]


def as_stored(model: Any, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return tensors of a model, by name, under the names and in the shapes of its checkpoint."""
    found = revert_weight_conversion(model, dict(tensors))
    return {name: tensor.contiguous() for name, tensor in dict(found).items()}


def stored_names(model: Any, names: Sequence[str]) -> list[str]:
    """Return the names that tensors of a model have in its checkpoint."""
    parameters = dict(model.named_parameters())
    return list(as_stored(model, {name: torch.empty(parameters[name].shape, device="meta") for name in names}))


def as_loaded(model: Any, shapes: Mapping[str, torch.Size], read: Callable[[str], torch.Tensor]) -> Tensors:
    """Return tensors of a model from those of its checkpoint, the inverse of `as_stored`.

    Args:
        model: The model.
        shapes: The names and shapes of the tensors.
        read: Returns a tensor of the checkpoint by its name.
    """
    described = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    if {name: tensor.shape for name, tensor in as_stored(model, described).items()} == dict(shapes):
        return {name: read(name) for name in shapes}
    numbered, first = {}, 0
    places = {}
    for name, shape in shapes.items():
        count = shape.numel()
        # the numbers of the values take the way of the values: so it is known where each is stored
        numbered[name] = torch.arange(first, first + count).reshape(shape)
        places[name] = (first, first + count)
        first += count
    values = torch.empty(first)
    for name, numbers in as_stored(model, numbered).items():
        values[numbers.reshape(-1)] = read(name).float().reshape(-1)
    return {name: values[slice(*places[name])].reshape(shape) for name, shape in shapes.items()}
