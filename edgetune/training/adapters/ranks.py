"""The ranks of AdaLoRA, which are cut after each optimizer step, and their state in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from edgetune.errors import ConfigError
from edgetune.methods.adalora import AdaLora

STATE_FILE = "adalora.safetensors"
_STATISTICS = ("ipt", "exp_avg_ipt", "exp_avg_unc")
_KEPT = "kept"


class RankCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Cuts ranks as PEFT's allocator decides.

    The ranks that are cut stay in the tensors, with singular values of zero: with a `rank_pattern` in its
    configuration, PEFT would write smaller tensors into a checkpoint, for which the optimizer's state does not fit.
    """

    def __init__(self, model: Any, method: AdaLora) -> None:
        self._model = model.base_model
        self._config = model.peft_config["default"]
        self._method = method
        self._kept: dict[str, list[bool]] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the phases for the number of steps, and restore the state of a checkpoint."""
        if why := self._method.why_not_steps(state.max_steps):
            raise ConfigError(f"adapter.kind: adalora: {why}", "Train longer, or lower these numbers")
        self._config.total_step = state.max_steps
        self._config.tinit, self._config.tfinal = self._method.phases(state.max_steps)
        self._model.rankallocator.set_total_step(state.max_steps)
        if state.global_step:
            self._restore(Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the gradient of the regularization, once for each step."""
        if self._method.orthogonality:
            torch.autograd.backward(self._method.orthogonality * self._deviation())

    def _deviation(self) -> torch.Tensor:
        """Return the mean distance of the Gram matrices of the factors from the identity, as PEFT computes it."""
        distances = []
        for name, factor in self._model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                gram = factor @ factor.T if ".lora_A." in name else factor.T @ factor
                distances.append(torch.linalg.norm(gram - torch.eye(len(gram)).to(gram)))
        return torch.stack(distances).mean()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Cut ranks, while the gradients that tell their importance are there."""
        self._config.rank_pattern = self._kept
        self._model.update_and_allocate(state.global_step)
        self._kept, self._config.rank_pattern = self._config.rank_pattern, None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Store the importance of all ranks, and which are kept, in the checkpoint."""
        allocator = self._model.rankallocator
        tensors = {
            f"{statistic}/{name}": value.detach().cpu().contiguous()
            for statistic in _STATISTICS
            for name, value in getattr(allocator, statistic).items()
        }
        kept = {f"{_KEPT}/{name}": torch.tensor(value) for name, value in (self._kept or {}).items()}
        save_file(tensors | kept, Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE)

    def _restore(self, file: Path) -> None:
        allocator, device = self._model.rankallocator, next(self._model.parameters()).device
        kept = {}
        for key, value in load_file(file).items():
            statistic, _, name = key.partition("/")
            if statistic == _KEPT:
                kept[name] = value.tolist()
            else:
                getattr(allocator, statistic)[name] = value.to(device)
        self._kept = kept or None
