"""What every objective states: its options, as a section of the configuration, and the facts that others ask for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from edgetune.section import Section


@dataclass(frozen=True)
class ObjectiveMetric:
    """A figure that an objective logs, for training and for evaluation."""

    name: str
    """The name in metrics.jsonl, TensorBoard, the manifest and the report."""
    source: str
    """TRL's name of it."""
    meaning: str
    """What it says, for the documentation and the report."""

    @property
    def title(self) -> str:
        """The name in words, such as "reward margin" or "KL"."""
        return " ".join("KL" if word == "kl" else word for word in self.name.split("_"))


@dataclass(frozen=True)
class ObjectiveFacts:
    """What is known of an objective without its options."""

    title: str
    """The name in tables and messages, such as "DPO"."""
    paper: str
    """arXiv number or another source."""
    trainer: str
    """The trainer of TRL."""
    metrics: tuple[ObjectiveMetric, ...] = ()
    """What is logged beside the loss; the first three are shown beside the progress bar."""
    is_experimental: bool = False
    """Whether the trainer lies in TRL's experimental part, which changes without notice."""
    needs_reference: bool = False
    """Whether the loss compares the model with the base, which is the model with its adapter switched off."""
    generates: bool = False
    """Whether the model answers prompts during training."""
    rows_per_example: int = 1
    """Rows that the model reads for an example of the batch: 2 for pairs."""
    logit_copies: float | None = None
    """Arrays in f32 of the size of the batch's logits that are in memory at one time, measured with TRL 1.16. None: the
    trainer computes logits in tiles of the vocabulary."""
    is_scorer: bool = False
    """Whether the trained model gives a score in place of a text."""
    loss_unit: str = ""
    """Unit of the loss; "" where it is a number without one."""


@dataclass(frozen=True)
class Batching:
    """The options of `training` that an objective may contradict."""

    batch_size: int
    gradient_accumulation: int

    @property
    def rows_of_step(self) -> int:
        """Rows of an optimizer step."""
        return self.batch_size * self.gradient_accumulation


class Objective(Section):
    """What is learned from the rows, and its options."""

    facts: ClassVar[ObjectiveFacts]

    kind: str
    """The objective."""

    @property
    def compares_with_base(self) -> bool:
        """Whether the loss needs the base beside the model that is trained."""
        return self.facts.needs_reference

    def contradictions(self, batching: Batching) -> Iterator[str]:
        """Yield what cannot be trained with these options together, a sentence each."""
        yield from ()

    def steps_per_epoch(self, items: int, batching: Batching) -> int:
        """Return the optimizer steps of a pass over so many rows, pairs or prompts, as the trainer counts them."""
        batches = math.ceil(items / batching.batch_size)
        return max(1, math.ceil(batches / batching.gradient_accumulation))

    def with_paths(self, resolve: Callable[[str], str]) -> Self:
        """Return the objective with absolute paths: `resolve` makes one that is relative to the configuration so."""
        return self

    def files(self) -> list[Path]:
        """Return the files beside the rows that the trained weights depend on."""
        return []

    def trl_options(self) -> dict[str, Any]:
        """Return the options under TRL's names, for the class of its configuration."""
        return {}


NATS = "nats per token"
MARGIN = ObjectiveMetric(
    "reward_margin", "rewards/margins", "reward of the chosen answer less that of the rejected one; it should rise"
)
ACCURACY = ObjectiveMetric(
    "reward_accuracy", "rewards/accuracies", "share of the pairs whose chosen answer has the higher reward"
)
CHOSEN = ObjectiveMetric("chosen_log_prob", "logps/chosen", "log-probability of the chosen answers, in nats")
REJECTED = ObjectiveMetric("rejected_log_prob", "logps/rejected", "log-probability of the rejected answers, in nats")
CHOSEN_PER_TOKEN, REJECTED_PER_TOKEN = (
    ObjectiveMetric(name, source, f"mean log-probability of the {name.partition('_')[0]} answers, in nats per token")
    for name, source in (("chosen_log_prob", "logps/chosen"), ("rejected_log_prob", "logps/rejected"))
)
KL = ObjectiveMetric(
    "kl",
    "kl",
    "mean log-probability of the chosen and the rejected answers less that of the base, in nats per answer; it "
    "estimates the KL divergence from the base as far as the model would give these answers, and may else be negative",
)
KL_OF_EVALUATIONS = ObjectiveMetric(KL.name, KL.source, f"{KL.meaning}; on held-out rows alone")
"""Of objectives without a reference model: it takes a forward pass of the base."""
PAIR_METRICS = (MARGIN, ACCURACY, KL, CHOSEN, REJECTED)
"""Of objectives with a reference model."""
PAIR_METRICS_PER_TOKEN = (MARGIN, ACCURACY, KL_OF_EVALUATIONS, CHOSEN_PER_TOKEN, REJECTED_PER_TOKEN)
