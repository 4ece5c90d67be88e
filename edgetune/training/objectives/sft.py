"""TRL's SFTTrainer on the token ids and loss masks of edgetune.data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from edgetune.data.masks import EncodedRow
from edgetune.errors import DataError
from edgetune.training.objectives.arguments import WarmupShare
from edgetune.training.objectives.inputs import EncodedRowsTrainer, TrainerInputs

TASKS = "task_ids"
"""The column of the number of the task, as PEFT's models name it."""


class SftTrainer(EncodedRowsTrainer, SFTTrainer):  # type: ignore[misc]  # TRL is not typed
    """SFTTrainer on encoded rows."""


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
        if TASKS in rows[0]:
            batch[TASKS] = torch.tensor([row[TASKS] for row in rows])
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


def to_dataset(rows: Sequence[EncodedRow], tasks: Sequence[int] = ()) -> Dataset:
    """Convert rows, and the numbers of their tasks if there are any, to the `datasets` table that TRL needs."""
    columns = {"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}
    return Dataset.from_dict(columns | ({TASKS: list(tasks)} if tasks else {}))


class SftArguments(WarmupShare, SFTConfig):  # type: ignore[misc]
    """SFTConfig with a share of warm-up steps."""


def build_sft(inputs: TrainerInputs, trainer_class: type[SftTrainer] = SftTrainer) -> SftTrainer:
    """Build the trainer of supervised fine-tuning and of continued pretraining."""
    prepared = inputs.prepared
    tasks: list[str] = getattr(prepared.config.adapter, "tasks", [])
    arguments = SftArguments(
        remove_unused_columns=not tasks,
        **inputs.arguments,
        max_length=None,
        shuffle_dataset=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    # a text without a chat has no answers, whose stop token must be trained on
    stop_ids = frozenset() if prepared.config.objective.kind == "pretrain" else prepared.stop_ids
    return trainer_class(
        args=arguments,
        data_collator=Collator(prepared.pad_id, stop_ids),
        train_dataset=to_dataset(prepared.train.rows, [tasks.index(task) for task in prepared.train.tasks]),
        eval_dataset=to_dataset(prepared.validation.rows, [tasks.index(task) for task in prepared.validation.tasks]),
        **inputs.keywords(),
    )
