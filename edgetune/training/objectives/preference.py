"""TRL's trainers of preference pairs on our token ids: DPO and IPO, ORPO, CPO and SimPO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from edgetune.data.objective_rows import EncodedAnswer, EncodedPair
from edgetune.methods import Lora
from edgetune.training.objectives.arguments import WarmupShare
from edgetune.training.objectives.inputs import BaseAsReference, EncodedRowsTrainer, TrainerInputs, pad_right

SIDES = ("chosen", "rejected")


class DpoTrainer(BaseAsReference, EncodedRowsTrainer, DPOTrainer):  # type: ignore[misc]  # TRL is not typed
    """DPOTrainer on encoded pairs."""

    reference_keys = ("ref_chosen_logps", "ref_rejected_logps")

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """Compute the loss, and log the log-probability of the answers less that of the base (the figure `kl`)."""
        found = super()._compute_loss(model, inputs, return_outputs)
        logged = self._metrics["train" if self.model.training else "eval"]
        base = sum(float(self.accelerator.gather_for_metrics(each).mean()) for each in self.reference_log_probs)
        logged["kl"].append((logged["logps/chosen"][-1] + logged["logps/rejected"][-1] - base) / 2)
        return found


class DpoArguments(WarmupShare, DPOConfig):  # type: ignore[misc]
    """DPOConfig with a share of warm-up steps."""


class CpoArguments(WarmupShare, CPOConfig):  # type: ignore[misc]
    """CPOConfig with a share of warm-up steps."""


class OrpoArguments(WarmupShare, ORPOConfig):  # type: ignore[misc]
    """ORPOConfig with a share of warm-up steps."""


class _TokenizedRow:
    """Leaves the rows as they are, which ORPO and CPO would tokenize, and counts the tokens, which they do not.

    In an evaluation it also asks the base, which is the model with its adapter switched off, for the figure `kl`.
    """

    tokens = 0
    has_base = True
    """Whether the model without its adapter is the base: not where a start was taken out of it (PiSSA)."""

    def _is_per_token(self) -> bool:
        """Whether the trainer's log-probabilities are means over the tokens of an answer."""
        return True

    def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> Any:
        """Return log-probabilities of both sides [rows] and more; those of the last batch are kept."""
        found = super().concatenated_forward(model, batch)  # type: ignore[misc]
        self._log_probs = torch.stack(found[:2]).detach()
        return found

    def get_batch_loss_metrics(self, model: Any, batch: dict[str, Any], train_eval: str = "train") -> Any:
        """Return loss and metrics of a batch, in an evaluation with `eval_kl`."""
        loss, metrics = super().get_batch_loss_metrics(model, batch, train_eval)  # type: ignore[misc]
        if train_eval == "eval" and self.has_base:
            own: Any = self
            of_model = self._log_probs
            with torch.no_grad(), own.accelerator.unwrap_model(own.model).disable_adapter():
                self.concatenated_forward(model, batch)
            difference = of_model - self._log_probs
            if self._is_per_token():
                difference *= torch.stack([(batch[f"{side}_labels"][:, 1:] != -100).sum(1) for side in SIDES])
            metrics["eval_kl"] = float(own.accelerator.gather_for_metrics(difference).mean())
        return loss, metrics

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        """Return the row."""
        return feature

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss of a batch, and count its tokens."""
        self.tokens += sum(int(inputs[f"{side}_attention_mask"].sum()) for side in SIDES)
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the number of tokens so far to the log of a step."""
        if "loss" in logs:
            logs["num_tokens"] = self.tokens
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class CpoTrainer(_TokenizedRow, EncodedRowsTrainer, CPOTrainer):  # type: ignore[misc]
    """CPOTrainer on encoded pairs."""

    def _is_per_token(self) -> bool:
        return self.loss_type in ("ipo", "simpo")


class OrpoTrainer(_TokenizedRow, EncodedRowsTrainer, ORPOTrainer):  # type: ignore[misc]
    """ORPOTrainer on encoded pairs."""


class ConcatenatedCollator:
    """Pads pairs to one batch, the chosen rows before the rejected ones, as DPOTrainer reads it."""

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return input_ids, attention_mask and completion_mask, each int64 [2 * rows, longest]."""
        ids = [row[f"{side}_ids"] for side in SIDES for row in rows]
        masks = [row[f"{side}_mask"] for side in SIDES for row in rows]
        return {
            "input_ids": pad_right(ids, self._pad_id),
            "attention_mask": pad_right([[1] * len(each) for each in ids], 0),
            "completion_mask": pad_right(masks, 0),
        }


class SidesCollator:
    """Pads the chosen and the rejected rows apart, as ORPOTrainer and CPOTrainer read them."""

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return input_ids, attention_mask and labels of both sides, each int64 [rows, longest of the side]."""
        batch = {}
        for side in SIDES:
            ids, masks = [row[f"{side}_ids"] for row in rows], [row[f"{side}_mask"] for row in rows]
            labels = [
                [id_ if trained else -100 for id_, trained in zip(*each, strict=True)]
                for each in zip(ids, masks, strict=True)
            ]
            batch[f"{side}_input_ids"] = pad_right(ids, self._pad_id)
            batch[f"{side}_attention_mask"] = pad_right([[1] * len(each) for each in ids], 0)
            batch[f"{side}_labels"] = pad_right(labels, -100)
        return batch


def to_pair_table(pairs: Sequence[EncodedPair]) -> Dataset:
    """Convert pairs to the `datasets` table that TRL needs: whole rows, and which of their ids are scored."""
    answers: dict[str, list[EncodedAnswer]] = {side: [getattr(pair, side) for pair in pairs] for side in SIDES}
    columns: dict[str, list[list[int]]] = {}
    for side, given in answers.items():
        columns[f"{side}_ids"] = [answer.row.input_ids for answer in given]
        columns[f"{side}_mask"] = [[int(scored) for scored in answer.row.supervised] for answer in given]
    return Dataset.from_dict(columns)


def pair_tables(inputs: TrainerInputs) -> dict[str, Dataset]:
    """Return the training and the held-out pairs under the names of the constructor's arguments."""
    prepared = inputs.prepared
    return {
        "train_dataset": to_pair_table(prepared.train.pairs),
        "eval_dataset": to_pair_table(prepared.validation.pairs),
    }


def build_dpo(inputs: TrainerInputs) -> DpoTrainer:
    """Build the trainer of DPO and IPO. The reference model is the base: the adapter is switched off."""
    arguments = DpoArguments(**inputs.arguments, max_length=None, remove_unused_columns=False)
    return DpoTrainer(
        args=arguments,
        data_collator=ConcatenatedCollator(inputs.prepared.pad_id),
        **pair_tables(inputs),
        **inputs.keywords(),
    )


def build_cpo(inputs: TrainerInputs) -> Any:
    """Build the trainer of CPO and SimPO."""
    return _build_sides(inputs, CpoTrainer, CpoArguments)


def build_orpo(inputs: TrainerInputs) -> Any:
    """Build the trainer of ORPO."""
    return _build_sides(inputs, OrpoTrainer, OrpoArguments)


def _build_sides(inputs: TrainerInputs, trainer: Any, arguments: Any) -> Any:
    disable_progress_bars()  # of the passes over the rows, which change nothing here
    adapter = inputs.prepared.config.adapter
    made = trainer(
        args=arguments(**inputs.arguments, max_length=inputs.prepared.config.training.max_length,
                       remove_unused_columns=False),
        data_collator=SidesCollator(inputs.prepared.pad_id),
        **pair_tables(inputs),
        **inputs.keywords(),
    )  # fmt: skip
    made.has_base = not (isinstance(adapter, Lora) and adapter.moves_base)
    return made
