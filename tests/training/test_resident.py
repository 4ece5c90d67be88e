"""Resident weights: the results, gradients and adapters of weights that are dequantized at each use, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from edgetune.config import parse_config
from edgetune.errors import ConfigError
from edgetune.planning.memory import TrainingLayout
from edgetune.training.resident import keep_resident, release_resident
from edgetune.training.resume import changed_options
from tests.training import runs
from tests.training.objectives import encoded

SHAPES = ((96, 64), (64, 96), (100, 192))


def layer_of(kind: str, rows: int, columns: int, dtype: torch.dtype) -> Any:
    torch.manual_seed(rows)
    plain = torch.nn.Linear(columns, rows)
    made: Any
    if kind == "int8":
        made = Linear8bitLt(columns, rows, has_fp16_weights=False)
    else:
        made = Linear4bit(columns, rows, compute_dtype=dtype, quant_type=kind)
    made.load_state_dict(plain.state_dict())
    return made.to("cpu").requires_grad_(False)


def result_and_gradient(layer: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    given = torch.randn(2, 33, layer.in_features).to(dtype).requires_grad_()
    result = layer(given)
    result.backward(torch.randn(result.shape).to(dtype))
    assert given.grad is not None
    return result.detach(), given.grad


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_kept_weights_give_the_bits_of_bitsandbytes(kind: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    layer = layer_of(kind, *shape, dtype)
    before = result_and_gradient(layer, dtype)
    assert keep_resident(torch.nn.Sequential(layer), dtype) == shape[0] * shape[1] * dtype.itemsize
    for pair in zip(before, result_and_gradient(layer, dtype), strict=True):
        assert torch.equal(*pair)


def test_layers_use_what_is_kept_and_dequantize_again_when_it_is_released() -> None:
    layer = layer_of("nf4", 96, 64, torch.float32)
    before = result_and_gradient(layer, torch.float32)[0]
    keep_resident(torch.nn.Sequential(layer), torch.float32)
    layer.resident_weight.zero_()
    zero = result_and_gradient(layer, torch.float32)[0]
    assert torch.equal(zero, layer.bias.expand_as(zero))
    release_resident(layer, unless=torch.float32)
    assert torch.equal(result_and_gradient(layer, torch.float32)[0], zero)
    release_resident(layer)
    assert torch.equal(result_and_gradient(layer, torch.float32)[0], before)


def test_kept_weights_of_another_type_than_that_of_the_products_are_not_used() -> None:
    layer, plain = (layer_of("nf4", 96, 64, torch.bfloat16) for _ in range(2))
    keep_resident(torch.nn.Sequential(layer), torch.bfloat16)
    result_and_gradient(plain, torch.bfloat16)  # which rounds the bias
    layer.compute_dtype = plain.compute_dtype = torch.float32  # as the capture of a reference sets it
    expected = result_and_gradient(plain, torch.float32)
    for pair in zip(expected, result_and_gradient(layer, torch.float32), strict=True):
        assert torch.equal(*pair)


def test_8_bit_layers_round_their_inputs_in_evaluation_as_before() -> None:
    layer = layer_of("int8", 96, 64, torch.float32)
    layer.eval()
    inputs = torch.randn(4, 64)
    with torch.no_grad():
        before = layer(inputs)
        keep_resident(torch.nn.Sequential(layer), torch.float32)
        assert torch.equal(layer(inputs), before)


def test_a_model_without_quantized_layers_keeps_nothing() -> None:
    assert keep_resident(torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.float32) == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_the_adapter_does_not_depend_on_what_is_kept_and_what_is_computed_again(
    bits: int, base: Path, tmp_path: Path
) -> None:
    values = encoded.settings(base, tmp_path, {"kind": "sft"}, max_steps=3, eval_steps=1000)
    values |= {"quantization": {"bits": bits, "compute_dtype": "float32"}}
    values["adapter"] = {"r": 4, "dropout": 0.1}
    prepared = encoded.prepare(values)
    found = []
    for resident in (False, True):
        for checkpointing in (False, True):
            folder = tmp_path / f"{resident}-{checkpointing}"
            trainer = encoded.trainer_of(prepared, folder, TrainingLayout(resident, checkpointing))
            trainer.train()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            trained = {name: each.detach() for name, each in trainer.model.named_parameters() if each.requires_grad}
            found.append((losses, trained))
    losses, trained = found[0]
    assert any(bool(each.any()) for name, each in trained.items() if "lora_B" in name)
    for other_losses, other in found[1:]:
        assert other_losses == losses
        assert all(torch.equal(trained[name], other[name]) for name in trained)


def test_resident_weights_of_an_unquantized_base_are_refused(tmp_path: Path) -> None:
    values = {**runs.settings(tmp_path, tmp_path), "quantization": {"bits": 16, "resident": True}}
    with pytest.raises(ConfigError, match="bits: 16 has no quantized weights"):
        parse_config(values)


def test_a_run_is_resumed_with_another_layout_of_its_memory() -> None:
    before = {"training": {"gradient_checkpointing": True, "seed": 0}, "quantization": {"bits": 4}}
    now = {
        "training": {"gradient_checkpointing": "auto", "seed": 0}, "quantization": {"bits": 4, "resident": True}
    }  # fmt: skip
    assert changed_options(before, now) == []
    assert changed_options(before, {**now, "quantization": {"bits": 8}}) == ["quantization.bits"]
