"""The trainers of the objectives of `edgetune.objectives`: those of TRL, on our token ids and labels."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from transformers.trainer_callback import PrinterCallback

from edgetune.training import supervised_head
from edgetune.training.adapters import cast_trainable_to_float32, has_adapted_head
from edgetune.training.adapters.virtual_tokens import keep_parameters_in_checkpoints
from edgetune.training.objectives.adapted_head import build_with_adapted_head
from edgetune.training.objectives.inputs import TrainerInputs
from edgetune.training.unpadding import take_padding_out

_BUILDERS = {
    "sft": "sft.build_sft",
    "pretrain": "sft.build_sft",
    "dpo": "preference.build_dpo",
    "ipo": "preference.build_dpo",
    "orpo": "preference.build_orpo",
    "cpo": "preference.build_cpo",
    "simpo": "preference.build_cpo",
    "kto": "kto.build_kto",
    "distillation": "distillation.build_distillation",
    "reward": "reward.build_reward",
    "grpo": "online.build_grpo",
    "rloo": "online.build_rloo",
}
"""`objective.kind` -> the module in this package and its function. TRL takes seconds to import each trainer."""

__all__ = ["TrainerInputs", "build_trainer"]


def build_trainer(inputs: TrainerInputs) -> Any:
    """Build the trainer of the configured objective, which writes its checkpoints to `inputs.directory`."""
    supervised_head.install()
    take_padding_out(inputs.model, inputs.prepared.config.adapter)
    module, _, function = _BUILDERS[inputs.prepared.config.objective.kind].partition(".")
    build: Callable[[TrainerInputs], Any] = getattr(import_module(f"{__name__}.{module}"), function)
    if has_adapted_head(inputs.model):
        trainer = build_with_adapted_head(lambda: build(inputs), inputs.model)
    else:
        trainer = build(inputs)
    trainer.remove_callback(PrinterCallback)  # writes every log to standard output
    cast_trainable_to_float32(trainer.model)
    keep_parameters_in_checkpoints(trainer)
    return trainer
