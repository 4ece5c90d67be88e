"""TRL's KTOTrainer on our token ids and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from trl import KTOConfig, KTOTrainer

from edgetune.data.objective_rows import EncodedLabelled
from edgetune.training.objectives.arguments import WarmupShare
from edgetune.training.objectives.inputs import BaseAsReference, EncodedRowsTrainer, TrainerInputs, pad_right


class KtoTrainer(BaseAsReference, EncodedRowsTrainer, KTOTrainer):  # type: ignore[misc]  # TRL is not typed
    """KTOTrainer on encoded answers."""

    reference_keys = ("ref_logps", "ref_KL_logps")


class KtoArguments(WarmupShare, KTOConfig):  # type: ignore[misc]
    """KTOConfig with a share of warm-up steps."""


class LabelledCollator:
    """Pads answers with labels, and pairs each prompt with another answer of the batch.

    The KL divergence from the base is estimated on these other answers (arXiv:2402.01306, section 4.1). TRL pairs the
    rows in the order of the table, before they are shuffled; here they are paired in the batch, as the paper has it.
    """

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return ids and masks int64 [rows, longest], of the rows and, with the prefix KL_, of the other pairs."""
        others = [*rows[-1:], *rows[:-1]]
        answers = [(row["ids"], row["mask"]) for row in rows]
        paired = [_join(row, other) for row, other in zip(rows, others, strict=True)]
        labels = torch.tensor([row["label"] for row in rows])
        return {**self._pad("", answers), **self._pad("KL_", paired), "label": labels}

    def _pad(self, prefix: str, rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        return {
            f"{prefix}input_ids": pad_right([ids for ids, _ in rows], self._pad_id),
            f"{prefix}attention_mask": pad_right([[1] * len(ids) for ids, _ in rows], 0),
            f"{prefix}completion_mask": pad_right([mask for _, mask in rows], 0),
        }


def _join(row: dict[str, Any], other: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Return the prompt of one row with the answer of another."""
    prompt, start = row["prompt_length"], other["prompt_length"]
    ids = [*row["ids"][:prompt], *other["ids"][start:]]
    return ids, [*[0] * prompt, *other["mask"][start:]]


def to_table(rows: Sequence[EncodedLabelled]) -> Dataset:
    """Convert labelled answers to the `datasets` table that TRL needs."""
    return Dataset.from_dict(
        {
            "ids": [row.answer.row.input_ids for row in rows],
            "mask": [[int(scored) for scored in row.answer.row.supervised] for row in rows],
            "prompt_length": [row.answer.prompt_length for row in rows],
            "label": [row.label for row in rows],
        }
    )


def build_kto(inputs: TrainerInputs) -> KtoTrainer:
    """Build the trainer of KTO. The reference model is the base: the adapter is switched off."""
    prepared = inputs.prepared
    arguments = KtoArguments(**inputs.arguments, max_length=None, remove_unused_columns=False)
    trainer = KtoTrainer(
        args=arguments,
        data_collator=LabelledCollator(prepared.pad_id),
        train_dataset=to_table(prepared.train.labelled),
        eval_dataset=to_table(prepared.validation.labelled),
        **inputs.keywords(),
    )
    trainer.args.train_sampling_strategy = "random"  # TRL wants the order of its own pairing, which it does not do here
    return trainer
