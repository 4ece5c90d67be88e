"""Our options under the names of transformers and TRL, shared by the trainers of all objectives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from edgetune.config import Config
from edgetune.planning.optimizers import OPTIMIZERS
from edgetune.training.loading import compute_dtype


class WarmupShare:
    """Arguments of a trainer whose `warmup_steps` is always a share of the steps."""

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Return the warm-up steps: none for a training of one step, since the first has the learning rate 0."""
        share = float(self.warmup_steps)  # type: ignore[attr-defined]  # of TrainingArguments
        return min(math.ceil(num_training_steps * share), num_training_steps - 1)


def _of_projection(config: Config) -> dict[str, Any]:
    """Return the arguments of GaLore and APOLLO, none for another optimizer."""
    training = config.training
    if not OPTIMIZERS[training.optimizer].projects:
        return {}
    options = ",".join(f"{name}={value}" for name, value in training.optimizer_options.items())
    return {"optim_args": options or None, "optim_target_modules": training.optimizer_modules}


def common_arguments(config: Config, directory: Path, *, checkpointing: bool) -> dict[str, Any]:
    """Return the arguments that every trainer has: optimization, evaluation, checkpoints and device."""
    training = config.training
    on_gpu, products = torch.cuda.is_available(), compute_dtype(config)
    return {
        "output_dir": str(directory),
        "num_train_epochs": training.epochs,
        "max_steps": training.max_steps or -1,
        "per_device_train_batch_size": training.batch_size,
        "per_device_eval_batch_size": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.scheduler,
        "warmup_steps": training.warmup_ratio,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optim": training.optimizer,
        **_of_projection(config),
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "seed": training.seed,
        "data_seed": training.seed,
        "bf16": products is torch.bfloat16,
        "fp16": products is torch.float16,
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "dataloader_num_workers": 0,
        "eval_strategy": "steps",
        "eval_steps": training.eval_steps,
        "prediction_loss_only": True,
        "save_strategy": "steps",
        "save_steps": training.save_steps,
        "save_total_limit": None,  # our own callback keeps the last complete ones
        "logging_steps": 1,  # our own callback averages
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": "none",
        "log_level": "error",
    }
