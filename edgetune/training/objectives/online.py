"""TRL's GRPOTrainer and RLOOTrainer on our prompts, with our rewards."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from edgetune.data.answer_frame import AnswerFrame, find_frame, read_answer
from edgetune.data.objective_rows import EncodedPrompt
from edgetune.objectives.online import Online
from edgetune.planning.prepare import PreparedRun
from edgetune.planning.rewards import Reward, make_rewards
from edgetune.training.objectives.arguments import WarmupShare
from edgetune.training.objectives.inputs import EncodedRowsTrainer, TrainerInputs, adapter_off_as_reference

TRAIN, HELD_OUT = "train", "validation"


class GrpoArguments(WarmupShare, GRPOConfig):  # type: ignore[misc]  # TRL is not typed
    """GRPOConfig with a share of warm-up steps."""


class RlooArguments(WarmupShare, RLOOConfig):  # type: ignore[misc]
    """RLOOConfig with a share of warm-up steps."""


class PromptIds:
    """Prompts by their key in TRL's table, and the answers to them as text."""

    def __init__(self, prepared: PreparedRun) -> None:
        self._prepared = prepared
        self._splits = {TRAIN: prepared.train.prompts, HELD_OUT: prepared.validation.prompts}
        self.frame_of = cache(self._find_frame)

    def table(self, split: str) -> Dataset:
        """Return the table of a split: the key of each prompt."""
        return Dataset.from_dict({"prompt": [f"{split} {number}" for number in range(len(self._splits[split]))]})

    def __getitem__(self, key: str) -> EncodedPrompt:
        split, _, number = key.partition(" ")
        return self._splits[split][int(number)]

    def read(self, key: str, ids: Sequence[int]) -> str:
        """Return the answer alone: without stop token and what the template writes around it."""
        stops = self._prepared.stop_ids
        is_cut = not ids or ids[-1] not in stops
        kept = list(ids) if is_cut else list(ids[:-1])
        return read_answer(self.frame_of(key), self._prepared.tokenizer.pieces(kept), is_cut=is_cut)

    def _find_frame(self, key: str) -> AnswerFrame:
        prompt, tokenizer = self[key], self._prepared.tokenizer
        stops = [tokenizer.text_of(id_) for id_ in tokenizer.ending_ids]
        return find_frame(self._prepared.template.with_options(prompt.options), prompt.messages, prompt.tools, stops)


class RewardColumn:
    """A reward as TRL calls it."""

    def __init__(self, reward: Reward, prompts: PromptIds) -> None:
        self.__name__ = reward.name
        self._reward, self._prompts = reward, prompts

    def __call__(
        self, prompts: list[str], completions: Any, completion_ids: list[list[int]], **columns: Any
    ) -> list[float]:
        """Return the reward of each answer."""
        return [
            self._reward.score(self._prompts.read(key, ids), self._prompts[key])
            for key, ids in zip(prompts, completion_ids, strict=True)
        ]


class _OwnPrompts(EncodedRowsTrainer):
    """Gives the trainer our token ids, and evaluations random numbers of their own."""

    prompts: PromptIds

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [self.prompts[key].prompt_ids for key in prompts], None, {}

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate with fixed random numbers, so that training does not depend on `training.eval_steps`."""
        with torch.random.fork_rng():
            torch.manual_seed(self.args.seed)
            figures: dict[str, float] = super().evaluate(*args, **kwargs)  # type: ignore[misc]
        return figures


class GrpoTrainer(_OwnPrompts, GRPOTrainer):  # type: ignore[misc]
    """GRPOTrainer on encoded prompts."""


class RlooTrainer(_OwnPrompts, RLOOTrainer):  # type: ignore[misc]
    """RLOOTrainer on encoded prompts."""


def build_grpo(inputs: TrainerInputs) -> Any:
    """Build the trainer of GRPO."""
    return _build(inputs, GrpoTrainer, GrpoArguments)


def build_rloo(inputs: TrainerInputs) -> Any:
    """Build the trainer of RLOO."""
    return _build(inputs, RlooTrainer, RlooArguments)


def _build(inputs: TrainerInputs, trainer_class: Any, arguments: Any) -> Any:
    prepared = inputs.prepared
    objective = prepared.config.objective
    assert isinstance(objective, Online)
    stop_ids = sorted(prepared.stop_ids)
    inputs.model.get_base_model().generation_config.eos_token_id = stop_ids
    prompts = PromptIds(prepared)
    generations = objective.num_generations
    # TRL evaluates whole groups of answers
    eval_size = generations * max(1, prepared.config.training.batch_size // generations)
    settings = {**inputs.arguments, "per_device_eval_batch_size": eval_size}
    with adapter_off_as_reference(inputs.model):
        trainer = trainer_class(
            args=arguments(**settings, remove_unused_columns=False),
            reward_funcs=[RewardColumn(reward, prompts) for reward in make_rewards(objective.rewards)],
            train_dataset=prompts.table(TRAIN),
            eval_dataset=prompts.table(HELD_OUT),
            **inputs.keywords(),
        )
    trainer.prompts = prompts
    trainer.eos_token_ids = stop_ids
    trainer.generation_config.eos_token_id = stop_ids
    trainer.generation_kwargs["eos_token_id"] = stop_ids
    return trainer
