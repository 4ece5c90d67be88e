"""TRL's SFTTrainer on the token ids and loss masks of edgetune.data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from edgetune.config import Config
from edgetune.data.masks import EncodedRow
from edgetune.errors import DataError
from edgetune.training.adapters import cast_trainable_to_float32
from edgetune.training.loading import compute_dtype


class Trainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer without the model card that it writes into every checkpoint."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing: the manifest of the run holds all of it."""


class Collator:
    """TRL's padding collator, which keeps our labels, with a check of the first batch.

    The check proves that the stop token is trained on and that padding is not: a pad token that is also the stop token
    would mask the end of every answer.
    """

    def __init__(self, pad_id: int, stop_ids: frozenset[int]) -> None:
        self._pad = DataCollatorForLanguageModeling(pad_token_id=pad_id)
        self._pad_id = pad_id
        self._stop_ids = stop_ids
        self._checked = False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Pad rows of unequal lengths to input_ids, attention_mask and labels, each int64 [rows, longest]."""
        batch: dict[str, Any] = self._pad(rows)
        if not self._checked:
            check_batch(batch, self._pad_id, self._stop_ids)
            self._checked = True
        return batch


def check_batch(batch: dict[str, Any], pad_id: int, stop_ids: frozenset[int]) -> None:
    """Raise DataError if the pad token is a stop token, padding is trained on, or labels differ from the token ids."""
    ids, labels, attended = batch["input_ids"], batch["labels"], batch["attention_mask"].bool()
    trained = labels != -100
    problems = {
        f"the pad token {pad_id} is also a stop token": pad_id in stop_ids,
        "padding is trained on": bool((trained & ~attended).any()),
        "labels are not the tokens themselves": bool((labels[trained] != ids[trained]).any()),
        "no token is trained on": not bool(trained.any()),
        "the first token, which nothing predicts, is trained on": bool(trained[:, 0].any()),
    }
    found = [problem for problem, there in problems.items() if there]
    if found:
        raise DataError.of_many("problems in the first batch", found, "Look at the rows with `edgetune preview`")


def to_dataset(rows: Sequence[EncodedRow]) -> Dataset:
    """Convert rows to the `datasets` table that TRL needs."""
    return Dataset.from_dict({"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]})


class TrainerArguments(SFTConfig):  # type: ignore[misc]
    """SFTConfig whose `warmup_steps` is always a share of the steps."""

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Return the warm-up steps: none for a training of one step, since the first has the learning rate 0."""
        return min(math.ceil(num_training_steps * float(self.warmup_steps)), num_training_steps - 1)


def trainer_arguments(config: Config, directory: Path) -> TrainerArguments:
    """Return our options under TRL's names."""
    training = config.training
    on_gpu, products = torch.cuda.is_available(), compute_dtype(config)
    return TrainerArguments(
        output_dir=str(directory),
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.scheduler,
        warmup_steps=training.warmup_ratio,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=training.optimizer,
        gradient_checkpointing=training.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        seed=training.seed,
        data_seed=training.seed,
        bf16=products is torch.bfloat16,
        fp16=products is torch.float16,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        dataloader_num_workers=0,
        max_length=None,
        shuffle_dataset=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        eval_strategy="steps",
        eval_steps=training.eval_steps,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=training.save_steps,
        save_total_limit=None,  # our own callback keeps the last complete ones
        logging_steps=1,  # our own callback averages
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        log_level="error",
    )


def build_trainer(
    model: Any,
    tokenizer: Any,
    train_rows: Sequence[EncodedRow],
    eval_rows: Sequence[EncodedRow],
    collator: Collator,
    config: Config,
    directory: Path,
    callbacks: Sequence[TrainerCallback],
) -> Trainer:
    """Build a trainer that writes its checkpoints to `directory`."""
    from transformers.trainer_callback import PrinterCallback

    trainer = Trainer(
        model=model,
        args=trainer_arguments(config, directory),
        data_collator=collator,
        train_dataset=to_dataset(train_rows),
        eval_dataset=to_dataset(eval_rows),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)  # writes every log to standard output
    cast_trainable_to_float32(trainer.model)
    return trainer
