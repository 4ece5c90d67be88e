"""What GRPO and RLOO have in common: the model answers prompts, and rewards say how good the answers are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field

from edgetune.objectives.base import Batching, Objective, ObjectiveMetric
from edgetune.objectives.rewards import RewardConfig

METRICS = (
    ObjectiveMetric("reward", "reward", "weighted sum of the rewards, as a mean over the answers; it should rise"),
    ObjectiveMetric("kl", "kl", "estimated KL divergence from the base, in nats per token (with beta above 0)"),
    ObjectiveMetric("reward_std", "reward_std", "standard deviation of the rewards; at 0 nothing is learned"),
    ObjectiveMetric(
        "without_contrast", "frac_reward_zero_std", "share of the prompts whose answers all have the same reward"
    ),
    ObjectiveMetric("answer_length", "completions/mean_length", "mean length of the answers, in tokens"),
    ObjectiveMetric("cut_answers", "completions/clipped_ratio", "share of the answers cut at max_completion_length"),
    ObjectiveMetric("entropy", "entropy", "mean entropy of the next token, in nats"),
)


class Online(Objective):
    """An objective whose answers are generated during training."""

    rewards: Annotated[list[RewardConfig], Field(min_length=1, validate_default=True)] = ["exact"]  # type: ignore[list-item]
    """How answers are rewarded: a list such as [exact, {format: '<answer>.*</answer>', weight: 0.2}]; see
    docs/objectives.md."""
    num_generations: Annotated[int, Field(ge=2)] = 8
    """Answers to each prompt, which are compared with one another."""
    max_completion_length: Annotated[int, Field(ge=1)] = 256
    """Largest number of tokens of a generated answer."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the generation."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Generate from the most likely tokens with this sum of probabilities."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Generate from the k most likely tokens; 0: from all."""
    mask_truncated: bool = False
    """Leave answers that were cut at `max_completion_length` out of the loss."""

    beta: float

    @property
    def compares_with_base(self) -> bool:
        """Whether the loss has a KL divergence from the base."""
        return self.beta > 0

    def contradictions(self, batching: Batching) -> Iterator[str]:
        """Yield what cannot be trained together."""
        answers = batching.batch_size * batching.gradient_accumulation
        if answers % self.num_generations:
            yield (
                f"training.batch_size times training.gradient_accumulation is {answers} answers a step, which "
                f"objective.num_generations {self.num_generations} does not divide: set training.batch_size to a "
                "multiple of it, or lower it"
            )
        names = [reward.name for reward in self.rewards]
        if not any(reward.weight for reward in self.rewards):
            yield f"objective.rewards have no weight: {', '.join(names)}"
        plain = [reward.model_dump(exclude={"weight"}) for reward in self.rewards]
        twice = [name for at, name in enumerate(names) if plain[at] in plain[:at]]
        if twice:
            yield f"objective.rewards have {twice[0]} twice, which counts twice: leave one out, and raise its weight"

    def prompts_per_step(self, batching: Batching) -> int:
        """Return the prompts whose answers make one optimizer step."""
        return batching.batch_size * batching.gradient_accumulation // self.num_generations

    def steps_per_epoch(self, items: int, batching: Batching) -> int:
        """Return the steps of a pass over so many prompts; those that fill no step are left out of it."""
        return items // self.prompts_per_step(batching)

    def with_paths(self, resolve: Callable[[str], str]) -> Self:
        """Return the objective with absolute paths of reward functions."""

        def resolved(reward: RewardConfig) -> RewardConfig:
            file, _, name = (reward.function or "").rpartition(":")
            return reward.model_copy(update={"function": f"{resolve(file)}:{name}"}) if file else reward

        return self.model_copy(update={"rewards": [resolved(reward) for reward in self.rewards]})

    def files(self) -> list[Path]:
        """Return the files of reward functions."""
        return [Path(reward.function.rpartition(":")[0]) for reward in self.rewards if reward.function]

    def trl_options(self) -> dict[str, Any]:
        """Return the options under TRL's names."""
        return {
            "num_generations": self.num_generations,
            "max_completion_length": self.max_completion_length,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "mask_truncated_completions": self.mask_truncated,
            "reward_weights": [reward.weight for reward in self.rewards],
        }
