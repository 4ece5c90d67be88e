"""The rewards of GRPO and RLOO: computed on answers, and tried on the rows before training."""

from __future__ import annotations

import math
import re
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edgetune.config import Config, TrainingConfig
from edgetune.data.objective_rows import EncodedPrompt
from edgetune.errors import ConfigError, DataError
from edgetune.objectives.online import Online
from edgetune.objectives.rewards import RewardConfig
from edgetune.planning.base_model import ContextLimit
from edgetune.validation.answers import answer_matches

TRIED = 8
"""Number of rows on which functions of the user are tried before training."""
_SHOWN = 200

PythonReward = Callable[[str, Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Reward:
    """A reward with what it needs to be computed."""

    config: RewardConfig

    @property
    def name(self) -> str:
        """The reward in messages and among the metrics."""
        return self.config.name

    def score(self, answer: str, prompt: EncodedPrompt) -> float:
        """Return the reward of an answer without its stop token.

        Raises:
            DataError: The row has no expected answer of this kind, or the function of the user fails or returns no
                finite number; the row and the answer are shown.
        """
        config = self.config
        if config.kind == "python":
            return self._call(answer, prompt)
        if config.extract is not None:
            found = re.search(config.extract, answer, re.DOTALL)
            if found is None or found[1] is None:
                return 0.0
            answer = found[1]
        if config.kind == "format":
            return float(re.fullmatch(str(config.pattern), answer.strip(), re.DOTALL) is not None)
        expected = config.pattern if config.pattern is not None else self._expected(prompt)
        try:
            return float(answer_matches(config.kind, expected, answer))
        except DataError as error:
            raise DataError(f"{prompt.place}: the reward {self.name}: {error.message}", self._hint) from None

    @property
    def _hint(self) -> str:
        return f"Correct the column {self.config.column!r}, name another (column: KEY), or take another reward"

    def _expected(self, prompt: EncodedPrompt) -> str:
        if self.config.column not in prompt.columns:
            raise DataError(
                f"{prompt.place}: the reward {self.name} reads the column {self.config.column!r}, which the row does "
                f"not have; it has {', '.join(sorted(prompt.columns)) or 'the prompt alone'}",
                "Name the column with the expected answer in objective.rewards (column: KEY)",
            )
        value = prompt.columns[self.config.column]
        return value if isinstance(value, str) else str(value)

    @cached_property
    def _function(self) -> PythonReward:
        file, _, name = str(self.config.function).rpartition(":")
        if not Path(file).is_file():
            raise ConfigError(f"objective.rewards: there is no file {file}", "Give FILE.py:FUNCTION")
        try:
            found = runpy.run_path(file).get(name)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a file of the user may raise anything
            raise ConfigError(
                f"objective.rewards: {file} cannot be run: {type(error).__name__}: {' '.join(str(error).split())}",
                "Correct the file",
            ) from None
        if not callable(found):
            raise ConfigError(f"objective.rewards: {file} has no function {name!r}", "Give FILE.py:FUNCTION")
        function: PythonReward = found
        return function

    def _call(self, answer: str, prompt: EncodedPrompt) -> float:
        where = f"the reward function {self.config.function} on {prompt.place}, with the answer {answer[:_SHOWN]!r}"
        try:
            value = self._function(answer, {**prompt.columns, "messages": prompt.messages})
        except ConfigError:
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a function of the user may raise anything
            raise DataError(
                f"{where}, raises {type(error).__name__}: {' '.join(str(error).split())}",
                "Correct the function; it is called as FUNCTION(answer, row) with the columns of the row",
            ) from None
        number = _as_number(value)
        if number is None:
            raise DataError(
                f"{where}, returns {_shortened(value)}, which is no finite number", "Return a number, such as 0 or 1"
            )
        return number


def _as_number(value: Any) -> float | None:
    """Return a number of Python, NumPy or torch as a float; None for anything else, NaN and infinities."""
    if isinstance(value, str | bytes):
        return None
    try:
        number = float(value)
    except Exception:  # noqa: BLE001 - what the user returns may raise anything, such as an array of two numbers
        return None
    return number if math.isfinite(number) else None


def _shortened(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."


def check_generation(
    config: Config, context: ContextLimit | None, train: Sequence[EncodedPrompt], held_out: Sequence[EncodedPrompt]
) -> None:
    """Check what an objective generates during training: rewards on the rows, and prompts against step and context.

    Raises:
        DataError: A reward cannot be computed, a prompt and its answer pass the context of the base, or the prompts do
            not fill one step.
        ConfigError: A function of the user is not there.
    """
    objective = config.objective
    if not isinstance(objective, Online):
        return
    prompts = [*train, *held_out]
    try_rewards(make_rewards(objective.rewards), prompts)
    _check_prompts_of_a_step(objective, config.training, len(train))
    limit = context.tokens - objective.max_completion_length if context else None
    longest = max(prompts, key=lambda prompt: len(prompt.prompt_ids), default=None)
    if limit is not None and longest is not None and len(longest.prompt_ids) > limit:
        raise DataError(
            f"{longest.place}: the prompt has {len(longest.prompt_ids)} tokens; with objective.max_completion_length "
            f"({objective.max_completion_length}) it passes the {context.tokens if context else 0} tokens that the "
            "base was made for",
            "Lower objective.max_completion_length, or shorten the row",
        )


def _check_prompts_of_a_step(objective: Online, training: TrainingConfig, count: int) -> None:
    needed = objective.prompts_per_step(training.batching)
    if count < needed:
        raise DataError(
            f"{count} prompt{'' if count == 1 else 's'} to train on cannot fill a step of {needed}: "
            f"training.batch_size {training.batch_size} times training.gradient_accumulation "
            f"{training.gradient_accumulation} over objective.num_generations {objective.num_generations}",
            "Give more prompts, or lower training.batch_size or training.gradient_accumulation",
        )


def leftover_prompts(config: Config, count: int) -> str | None:
    """Return the note about prompts that fill no whole step, which each pass leaves out; None if there are none."""
    if not isinstance(config.objective, Online):
        return None
    needed = config.objective.prompts_per_step(config.training.batching)
    left = count % needed
    if not left:
        return None
    return (
        f"{left} of {count} prompts fill no whole step of {needed}, so each pass over the prompts leaves out {left}, "
        "drawn anew"
    )


def make_rewards(configs: Sequence[RewardConfig]) -> list[Reward]:
    """Return the rewards, in the order of the configuration."""
    return [Reward(config) for config in configs]


def try_rewards(rewards: Sequence[Reward], prompts: Sequence[EncodedPrompt]) -> None:
    """Compute each reward for the rows, with the expected answer, or none, in place of a generated one.

    Functions of the user are tried on the first rows alone, since they may take long. Raises what `Reward.score` does.
    """
    for reward in rewards:
        is_own = reward.config.kind == "python"
        for prompt in prompts[:TRIED] if is_own else prompts:
            expected = prompt.columns.get(reward.config.column, "")
            reward.score(expected if isinstance(expected, str) else str(expected), prompt)
