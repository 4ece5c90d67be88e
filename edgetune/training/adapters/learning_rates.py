"""LoRA+: the matrices B learn faster than the matrices A (arXiv:2402.12354)."""

from __future__ import annotations

from typing import Any

from peft.optimizers import create_loraplus_optimizer

from edgetune.methods import Lora, Method


def set_optimizer(trainer: Any, method: Method) -> None:
    """Give a trainer the configured optimizer with the learning rates of LoRA+, if the method asks for it."""
    if not isinstance(method, Lora) or method.loraplus_lr_ratio is None:
        return
    optimizer, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    trainer.optimizer = create_loraplus_optimizer(
        trainer.model, optimizer, loraplus_lr_ratio=method.loraplus_lr_ratio, weight_decay=trainer.args.weight_decay,
        **options,
    )  # fmt: skip
