"""Parts that a base does not have: biases of linear layers, and copies of blocks."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from edgetune.planning.base_model import ExportableLayers
from edgetune.training.adapters.checkpoint_layout import stored_names
from edgetune.training.adapters.linear_layers import linear_layers


def find_blocks(model: Any) -> tuple[str, torch.nn.ModuleList]:
    """Return the name of the list of the model's blocks, and the list."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if (
            isinstance(module, torch.nn.ModuleList)
            and len(module) == count
            and next(module.parameters(), None) is not None
        ):
            return name, module
    raise TypeError(f"{type(model).__name__} has no list of {count} blocks")


# -- biases ------------------------------------------------------------------------------------------------------------


def linear_names(model: Any, excluded: str | None = None) -> list[str]:
    """Return the names of the linear layers, without the head and without those that match `excluded`."""
    return [name for name, _ in _linear(model, excluded)]


def layers_without_bias(model: Any, excluded: str | None = None) -> list[str]:
    """Return the names of the linear layers that have no bias, without the head."""
    return [name for name, module in _linear(model, excluded) if module.bias is None]


def add_biases(model: Any, names: Sequence[str]) -> None:
    """Give linear layers the biases `names`, which are zero and in f32."""
    for name in names:
        module = model.get_submodule(name.rpartition(".")[0])
        device = module.weight.device
        module.bias = torch.nn.Parameter(torch.zeros(module.out_features, dtype=torch.float32, device=device))


def _linear(model: Any, excluded: str | None) -> Iterator[tuple[str, torch.nn.Linear]]:
    head = model.get_output_embeddings()
    for name, module in linear_layers(model, excluded):
        if module is not head:
            yield name, module


# -- blocks ------------------------------------------------------------------------------------------------------------

_OUTPUTS = frozenset(("attention_output", "ffn_down", "expert_down", "shared_down", "convolution_out"))
"""The slots of matrices whose results are added to the residual stream."""


def is_output(model: Any, name: str, layers: ExportableLayers | None) -> bool:
    """Whether a tensor is one of a layer whose results are added to the residual stream, or of all its experts."""
    if layers is None:
        return name.split(".")[-2] in ("o_proj", "down_proj")
    return any(layers.slots_of(stored) & _OUTPUTS for stored in stored_names(model, [name]))


def insert_blocks(model: Any, sources: Sequence[int]) -> dict[int, torch.nn.Module]:
    """Make the block i of the model the block `sources[i]` of the base; where that is repeated, a copy in f32.

    Returns:
        The copies by their numbers.
    """
    name, blocks = find_blocks(model)
    new: dict[int, torch.nn.Module] = {}
    found: list[torch.nn.Module] = []
    for number, source in enumerate(sources):
        is_copy = source in sources[:number]
        block = _copied(blocks[source]) if is_copy else blocks[source]
        found.append(block)
        if is_copy:
            new[number] = block
    for number, block in enumerate(found):
        module: Any
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, torch.nn.ModuleList(found))
    _expand_config(model.config.get_text_config(), sources, len(blocks))
    return new


def _expand_config(config: Any, sources: Sequence[int], before: int) -> None:
    """Give the config the number of blocks, and its lists an entry for each block."""
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == before and not key.startswith("_"):
            setattr(config, key, [value[source] for source in sources])
    config.num_hidden_layers = len(sources)


def _copied(block: torch.nn.Module) -> torch.nn.Module:
    """Return a copy in f32; weights in 4 bits are dequantized."""
    new = copy.deepcopy(block)
    for name, module in list(new.named_modules()):
        if type(module).__name__ == "Linear4bit":
            parent, _, own = name.rpartition(".")
            setattr(new.get_submodule(parent), own, _dequantized(module))
    return new.float()


def _dequantized(layer: Any) -> torch.nn.Linear:
    from bitsandbytes.functional import dequantize_4bit

    plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    values = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    plain.weight = torch.nn.Parameter(values)
    if layer.bias is not None:
        plain.bias = torch.nn.Parameter(layer.bias.detach().float().clone())
    return plain
