"""Distillation: the answers or the probabilities of a teacher are learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field

from edgetune.objectives.base import NATS, Batching, Objective, ObjectiveFacts, ObjectiveMetric

_LOCAL = {"beta": 0.0, "temperature": 1.0, "sft_weight": 0.0}
_REMOTE = {"teacher_model": None, "api_key_variable": "OPENAI_API_KEY", "answer_temperature": 0.0, "answer_tokens": 512}
"""Options with their defaults, which only one kind of teacher reads."""


class Distillation(Objective):
    """Distillation: learn the probabilities of a local teacher (arXiv:1503.02531, arXiv:2306.13649), or the answers of
    a teacher behind an OpenAI-compatible endpoint (arXiv:1606.07947)."""

    facts: ClassVar[ObjectiveFacts] = ObjectiveFacts(
        "distillation",
        "arXiv:2306.13649",
        "SFTTrainer with the loss of trl.experimental.gkd.GKDTrainer",
        (
            ObjectiveMetric("teacher_kl", "teacher_kl", "KL divergence from the local teacher, in nats per token"),
            ObjectiveMetric(
                "token_accuracy", "mean_token_accuracy", "share of the tokens that the model finds most likely"
            ),
        ),
        is_experimental=True,
        loss_unit=NATS,
    )

    kind: Literal["distillation"] = "distillation"
    """The objective."""
    teacher: str
    """A directory with a model of the same vocabulary, or the URL of an OpenAI-compatible endpoint
    (`http://localhost:8080/v1`)."""
    beta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Local teacher: 0: KL(teacher, model); 1: KL(model, teacher); between: the Jensen-Shannon divergence."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Local teacher: temperature of both distributions in the loss."""
    sft_weight: Annotated[float, Field(ge=0)] = 0.0
    """Local teacher: weight of the cross-entropy of the rows' answers, which is added to the loss."""
    teacher_model: str | None = None
    """Endpoint: the model that is asked for."""
    api_key_variable: str = "OPENAI_API_KEY"
    """Endpoint: the environment variable with the key; without it no key is sent."""
    answer_temperature: Annotated[float, Field(ge=0)] = 0.0
    """Endpoint: temperature of the answers; 0: greedy."""
    answer_tokens: Annotated[int, Field(ge=1)] = 512
    """Endpoint: largest number of tokens of an answer."""

    @property
    def is_remote(self) -> bool:
        """Whether the teacher is an endpoint."""
        return self.teacher.startswith(("http://", "https://"))

    def contradictions(self, batching: Batching) -> Iterator[str]:
        """Yield what cannot be trained together."""
        other, kind = (_LOCAL, "a local teacher") if self.is_remote else (_REMOTE, "an endpoint as teacher")
        for option, default in other.items():
            if getattr(self, option) != default:
                yield f"objective.{option} is read for {kind} alone; leave it out"
        if self.is_remote and not self.teacher_model:
            yield "objective.teacher_model is missing: name the model that the endpoint is asked for"

    def with_paths(self, resolve: Callable[[str], str]) -> Self:
        """Return the objective with the absolute path of a local teacher."""
        return self if self.is_remote else self.model_copy(update={"teacher": resolve(self.teacher)})

    def files(self) -> list[Path]:
        """Return the configuration and the weights of a local teacher."""
        if self.is_remote:
            return []
        teacher = Path(self.teacher)
        return [file for file in (teacher / "config.json", *sorted(teacher.glob("*.safetensors"))) if file.is_file()]
