"""TRL's SFTTrainer on the token ids and loss masks of edgetune.data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from edgetune.data.masks import EncodedRow
from edgetune.errors import DataError
from edgetune.training.objectives.arguments import WarmupShare
from edgetune.training.objectives.inputs import EncodedRowsTrainer, TrainerInputs


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


class SftArguments(WarmupShare, SFTConfig):  # type: ignore[misc]
    """SFTConfig with a share of warm-up steps."""


def build_sft(inputs: TrainerInputs, trainer_class: type[SftTrainer] = SftTrainer) -> SftTrainer:
    """Build the trainer of supervised fine-tuning and of continued pretraining."""
    prepared = inputs.prepared
    arguments = SftArguments(
        **inputs.arguments, max_length=None, shuffle_dataset=False, dataset_kwargs={"skip_prepare_dataset": True}
    )
    # a text without a chat has no answers, whose stop token must be trained on
    stop_ids = frozenset() if prepared.config.objective.kind == "pretrain" else prepared.stop_ids
    return trainer_class(
        args=arguments,
        data_collator=Collator(prepared.pad_id, stop_ids),
        train_dataset=to_dataset(prepared.train.rows),
        eval_dataset=to_dataset(prepared.validation.rows),
        **inputs.keywords(),
    )
