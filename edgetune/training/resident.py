"""Resident weights: the dequantized values of a quantized base, kept instead of being computed at every use.

QLoRA multiplies by the dequantized values D of the base. bitsandbytes computes D anew in each forward and backward
pass. Where memory allows, D is kept in the compute type. Forward and gradients are the same to the bit, so that
adapter, merge base and proof do not depend on it; this is tried on a layer of each model before it is used.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Linear8bitLt

_TRIED_ROWS = 40
_KEPT = "resident_weight"


def keep_resident(model: Any, dtype: torch.dtype) -> int:
    """Keep the dequantized weights of all quantized layers in the compute type, and return their bytes.

    Return 0 and change nothing if the model has no such layer, or a layer would compute another result.
    """
    layers = [module for module in model.modules() if isinstance(module, _KINDS)]
    if not layers or not _computes_the_same(layers[0], dtype):
        return 0
    for layer in layers:
        _keep(layer, dtype)
    return sum(getattr(layer, _KEPT).nbytes for layer in layers)


def release_resident(model: Any, unless: torch.dtype | None = None) -> None:
    """Let all layers dequantize at each use again; `unless` names the type of kept weights that may stay."""
    for layer in model.modules():
        if (
            isinstance(layer, _KINDS)
            and getattr(layer, _KEPT, None) is not None
            and layer.resident_weight.dtype != unless
        ):
            del layer.forward
            delattr(layer, _KEPT)


def _keep(layer: Any, dtype: torch.dtype) -> None:
    layer.register_buffer(_KEPT, _dequantize(layer, dtype), persistent=False)
    layer.forward = _ResidentForward(layer)


class _ResidentForward:
    """The forward of a layer with kept weights."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._own = type(layer).forward
        # 8-bit layers round their inputs in evaluation
        self._training_alone = isinstance(layer, Linear8bitLt)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        layer = self._layer
        weight = getattr(layer, _KEPT)
        wanted = inputs.dtype if self._training_alone else layer.compute_dtype or inputs.dtype
        if weight.dtype != wanted or (self._training_alone and not layer.training):
            result: torch.Tensor = self._own(layer, inputs)
            return result
        bias = None if layer.bias is None else layer.bias.to(wanted)
        product: torch.Tensor = torch.nn.functional.linear(inputs.to(wanted), weight, bias)
        return product.to(inputs.dtype)


@torch.no_grad()
def _dequantize(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return the weights [rows, columns] by which bitsandbytes multiplies in training."""
    if isinstance(layer, Linear4bit):
        state = copy.copy(layer.weight.quant_state)
        state.dtype = dtype
        found: torch.Tensor = functional.dequantize_4bit(layer.weight.data.view(-1, 1), state)
        return found
    if layer.weight.CB is not None:
        layer.init_8bit_state()
    kept: torch.Tensor = layer.state.CB.to(dtype, copy=True)
    return kept.mul_(layer.state.SCB.unsqueeze(1).mul(1.0 / 127.0))


_KINDS = (Linear4bit, Linear8bitLt)


def _computes_the_same(layer: Any, dtype: torch.dtype) -> bool:
    """Whether result and gradient of a layer are the same to the bit with its weights kept."""
    columns = layer.in_features
    inputs = torch.linspace(-1, 1, _TRIED_ROWS * columns, dtype=dtype, device=layer.weight.device).view(-1, columns)
    with _in_training(layer), torch.enable_grad():
        before = _result_and_gradient(layer, inputs)
        _keep(layer, dtype)
        after = _result_and_gradient(layer, inputs)
        release_resident(layer)
    return all(torch.equal(*pair) for pair in zip(before, after, strict=True))


@contextmanager
def _in_training(layer: Any) -> Iterator[None]:
    before = layer.training
    layer.train()
    try:
        yield
    finally:
        layer.train(before)


def _result_and_gradient(layer: Any, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    given = inputs.clone().requires_grad_()
    result: torch.Tensor = layer(given)
    (gradient,) = torch.autograd.grad(result, given, torch.ones_like(result))
    return result.detach(), gradient
