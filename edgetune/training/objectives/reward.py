"""TRL's RewardTrainer on our token ids: a score head beside the head of the language model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from trl import RewardConfig, RewardTrainer

from edgetune.planning.prepare import PreparedRun
from edgetune.reference.reward_scores import ScoredPair
from edgetune.training.objectives.arguments import WarmupShare
from edgetune.training.objectives.inputs import EncodedRowsTrainer, TrainerInputs
from edgetune.training.objectives.preference import SIDES, ConcatenatedCollator, to_pair_table

WEIGHT = "score.weight"
"""The tensor of the score head, as transformers calls it in models of sequence classification."""
_CHECKPOINT = "score_head.safetensors"


def _add_score_head(model: Any) -> Any:
    """Return a new score head, a part of the causal language model, whose first values depend on the seed alone."""
    base = model.get_base_model()
    config = base.config.get_text_config()
    head = torch.nn.Linear(config.hidden_size, 1, bias=False, dtype=torch.float32, device=model.device)
    torch.nn.init.normal_(head.weight, std=config.initializer_range)
    base.score = head
    return head


class Scorer:
    """A model as RewardTrainer calls it: the score of each row at its last token, as logits [rows, 1]."""

    def __init__(self, model: Any, head: Any) -> None:
        self._model, self._head = model, head

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> SimpleNamespace:
        """Return the scores of rows that are padded on the right."""
        outputs = self._model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, output_hidden_states=True,
            logits_to_keep=1,
        )  # fmt: skip
        hidden = outputs.hidden_states[-1][:, -input_ids.shape[1] :]  # virtual tokens stand before the row
        last = attention_mask.sum(1) - 1
        with torch.autocast(hidden.device.type, enabled=False):
            scores = self._head(hidden[torch.arange(len(last)), last].float())
        return SimpleNamespace(logits=scores)


class RewardModelTrainer(EncodedRowsTrainer, RewardTrainer):  # type: ignore[misc]  # TRL is not typed
    """RewardTrainer on encoded pairs, with a score head that is stored beside the adapter."""

    score_head: Any

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss of a batch."""
        return super().compute_loss(Scorer(model, self.score_head), inputs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        self.save_score_head(Path(output_dir or self.args.output_dir) / _CHECKPOINT)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        stored = load_file(Path(resume_from_checkpoint) / _CHECKPOINT)[WEIGHT]
        self.score_head.weight.data.copy_(stored)

    def save_score_head(self, file: Path) -> None:
        """Write the score head, f32 [1, hidden size]."""
        weight = self.score_head.weight.detach().float().cpu().contiguous()
        save_file({WEIGHT: weight}, file, metadata={"format": "pt"})

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Return the loss of held-out rows."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None


class RewardArguments(WarmupShare, RewardConfig):  # type: ignore[misc]
    """RewardConfig with a share of warm-up steps."""


class ScoredCollator(ConcatenatedCollator):
    """Pads pairs as RewardTrainer reads them, with their margins if every row states one."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return input_ids and attention_mask, each int64 [2 * rows, longest], and margin f32 [rows]."""
        batch = super().__call__(rows)
        del batch["completion_mask"]
        margins = [row["margin"] for row in rows]
        return batch if None in margins else {**batch, "margin": torch.tensor(margins)}


def build_reward(inputs: TrainerInputs) -> RewardModelTrainer:
    """Build the trainer of a reward model."""
    prepared = inputs.prepared

    def table(split: Any) -> Dataset:
        return to_pair_table(split.pairs).add_column("margin", [pair.margin for pair in split.pairs])

    config = inputs.model.config
    config.num_labels, before = 1, config.num_labels  # which RewardTrainer asks for
    head = _add_score_head(inputs.model)
    trainer = RewardModelTrainer(
        args=RewardArguments(**inputs.arguments, max_length=None, remove_unused_columns=False),
        data_collator=ScoredCollator(prepared.pad_id),
        train_dataset=table(prepared.train),
        eval_dataset=table(prepared.validation),
        **inputs.keywords(),
    )
    trainer.score_head = head
    config.num_labels = before
    return trainer


def score_pairs(prepared: PreparedRun, model: Any, head_file: Path, count: int) -> list[ScoredPair]:
    """Return token ids and scores of the first held-out pairs under the trained model."""
    weight = load_file(head_file)[WEIGHT].to(model.device)
    scorer = Scorer(model, lambda hidden: torch.nn.functional.linear(hidden, weight))
    rows = []
    for pair in prepared.validation.pairs[:count]:
        entry: dict[str, Any] = {}
        for side in SIDES:
            ids = getattr(pair, side).row.input_ids
            given = torch.tensor([ids], device=model.device)
            score = scorer(given, torch.ones_like(given)).logits
            entry |= {f"{side}_ids": ids, side: float(score)}
        rows.append(ScoredPair(**entry))
    return rows
