"""First values of LoRA that are computed: from the weights of the base, from training rows, or from its rounding.

Values that are taken out of the base leave the rest of it behind. The stored adapter is converted, so that it fits the
base as it is: W - s B0 A0 + s B A = W + s [B, -B0] [A; A0].
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import EvaConfig, LoraGAConfig
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from edgetune.methods import Lora, Method
from edgetune.methods.base import of_pattern
from edgetune_converters.adapters.peft_config import CONFIG_FILE

Start = dict[str, torch.Tensor]
_WEIGHTS = "adapter_model.safetensors"
_ROWS_PER_BATCH = 8


@dataclass(frozen=True)
class StartSources:
    """What first values are computed from beside the model."""

    rows: Callable[[], Sequence[Sequence[int]]]
    """Returns the token ids of the training rows."""
    load_original: Callable[[], Any]
    """Loads the base without quantization."""
    labels: Callable[[], Sequence[Sequence[int]]] | None = None
    """Returns the labels of the training rows. None: all tokens count."""


def before_attaching(model: Any, method: Method, wanted: LoraConfig, sources: StartSources | None) -> None:
    """Prepare the model and PEFT's configuration for first values that PEFT computes itself."""
    if not isinstance(method, Lora) or sources is None:
        return
    if method.init == "eva":
        wanted.init_lora_weights = "eva"
        # rho 1 keeps the ranks; all tokens count, as some batches have few that are trained on
        wanted.eva_config = EvaConfig(rho=1.0, use_label_mask=False)
    if method.init == "corda":
        _orient_by_covariance(model, method, wanted, sources)
    if method.init == "lora_ga":
        wanted.lora_ga_config = LoraGAConfig()
        _attach_gradients(model, method, wanted, sources)


def _attach_gradients(model: Any, method: Lora, wanted: LoraConfig, sources: StartSources) -> None:
    """Attach to each layer in `wanted.target_modules` the mean gradient that PEFT's start for LoRA-GA reads.

    PEFT's own preparation counts calls by hooks, which warn in the first layer.
    """
    layers = [module for name, module in model.named_modules() if name in wanted.target_modules]
    rows = sources.rows()[: method.calibration_rows]
    labels = sources.labels()[: method.calibration_rows] if sources.labels else rows
    for layer in layers:
        layer.weight.requires_grad_()
    used = [pair for pair in zip(rows, labels, strict=True) if any(label >= 0 for label in pair[1][1:])]
    for row, targets in used:
        ids, scored = (torch.tensor([values], device=model.device) for values in (row, targets))
        model(input_ids=ids, labels=scored).loss.backward()
    for layer in layers:
        if layer.weight.grad is not None:
            layer._peft_loraga_grad = layer.weight.grad / max(1, len(used))
        layer.weight.requires_grad_(False)
        layer.weight.grad = None


def after_attaching(adapted: Any, method: Method, sources: StartSources | None) -> None:
    """Compute the first values that PEFT does not."""
    if not isinstance(method, Lora) or sources is None:
        return
    if method.init == "eva":
        from peft import initialize_lora_eva_weights

        batches = list(_batches(method, sources, adapted.device))
        initialize_lora_eva_weights(adapted, batches, show_progress_bar=False)
        adapted.peft_config["default"].init_lora_weights = True
        adapted.peft_config["default"].eva_config = None
    if method.init == "lora_ga":  # PEFT leaves them in the type of the base
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if method.init == "loftq":
        _correct_rounding(adapted, sources.load_original())


@dataclass
class _Oriented:
    """The singular values and vectors of a weight times the covariance of its inputs, under PEFT's names."""

    S_WC: torch.Tensor
    U_WC: torch.Tensor
    V_WC: torch.Tensor


@torch.no_grad()
def _orient_by_covariance(model: Any, method: Lora, wanted: LoraConfig, sources: StartSources) -> None:
    """Attach to each layer in `wanted.target_modules` what PEFT's start for CorDA reads.

    PEFT's own preparation takes rows of equal lengths alone. As there: W C = U S V', and the update starts as the
    largest part of U S V' C^-1, where C is damped by a hundredth of its mean diagonal.
    """
    layers = {name: module for name, module in model.named_modules() if name in wanted.target_modules}
    covariances: dict[str, torch.Tensor] = {}

    def observe(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
            x = inputs[0].detach().float().flatten(0, -2)
            x = x / x.abs().max().clamp(min=1e-12)
            covariances[name] = covariances.get(name, torch.zeros((), device=x.device)) + x.T @ x

        return hook

    handles = [module.register_forward_hook(observe(name)) for name, module in layers.items()]
    for row in sources.rows()[: method.calibration_rows]:
        model(input_ids=torch.tensor([row], device=model.device))
    for handle in handles:
        handle.remove()
    for name, module in layers.items():
        covariance = covariances[name]
        covariance = covariance + 0.01 * covariance.diagonal().mean() * torch.eye(len(covariance)).to(covariance)
        weight = module.weight.float()
        weight = weight.T if isinstance(module, Conv1D) else weight
        left, values, right = torch.linalg.svd(weight @ covariance, full_matrices=False)
        rank = of_pattern(method.rank_pattern, name, method.r)
        back = torch.linalg.solve(covariance, right[:rank].T)  # the covariance is symmetric
        module.eigens = _Oriented(values[:rank].clone(), left[:, :rank].clone(), back)


def _batches(method: Lora, sources: StartSources, device: Any) -> Iterator[dict[str, torch.Tensor]]:
    rows = sources.rows()[: method.calibration_rows]
    for first in range(0, len(rows), _ROWS_PER_BATCH):
        batch = rows[first : first + _ROWS_PER_BATCH]
        ids = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.long)
        for number, row in enumerate(batch):
            ids[number, : len(row)] = torch.tensor(row)
        lengths = torch.tensor([len(row) for row in batch])
        mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
        yield {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _correct_rounding(adapted: Any, original: Any) -> None:
    """Set A and B to the best approximation of what 4 bits have rounded away (LoftQ with one step).

    PEFT's own function leaves out the scale of the update.
    """
    from peft.utils.integrations import dequantize_module_weight

    weights = dict(original.named_modules())
    for name, layer in adapted.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer) or "default" not in layer.lora_A:
            continue
        base_layer = layer.get_base_layer()
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        rounded = dequantize_module_weight(base_layer).float()
        missing = weights[name].weight.detach().to(rounded).float() - rounded
        left, values, right = torch.linalg.svd(missing, full_matrices=False)
        rank = a.shape[0]
        share = torch.sqrt(values[:rank] / layer.scaling["default"])
        a.data = (share[:, None] * right[:rank]).to(a.dtype)
        b.data = (left[:, :rank] * share).to(b.dtype)


def start_of(adapted: Any, method: Method) -> Start | None:
    """Return the first values of A and B if they have been taken out of the base, None otherwise."""
    if not isinstance(method, Lora) or not method.moves_base:
        return None
    return {
        _stored_name(name): parameter.detach().float().cpu().clone()
        for name, parameter in adapted.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


def _stored_name(name: str) -> str:
    return name.replace(".default.", ".")


def convert_stored(folder: Path, start: Start) -> None:
    """Convert a stored adapter of twice the rank, which fits the base as it was before `start` was taken out of it."""
    tensors = load_file(folder / _WEIGHTS)
    for name, first in start.items():
        trained = tensors[name]
        is_a = ".lora_A." in name
        other = first.to(trained.dtype) if is_a else -first.to(trained.dtype)
        tensors[name] = torch.cat([trained, other], dim=0 if is_a else 1).contiguous()
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    file = folder / CONFIG_FILE
    stated = json.loads(file.read_text(encoding="utf-8"))
    growth = math.sqrt(2) if stated["use_rslora"] else 2
    stated |= {
        "r": 2 * stated["r"],
        "lora_alpha": growth * stated["lora_alpha"],
        "rank_pattern": {key: 2 * rank for key, rank in stated["rank_pattern"].items()},
        "alpha_pattern": {key: 2 * alpha for key, alpha in stated["alpha_pattern"].items()},
        "init_lora_weights": True,
        "lora_ga_config": None,
    }
    file.write_text(json.dumps(stated, indent=2, sort_keys=True), encoding="utf-8")
