"""Evaluate the models of a run, or one exported file, on tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import edgetune
from edgetune import console
from edgetune.errors import ConfigError
from edgetune.evaluation import tasks as task_loading
from edgetune.evaluation.models import EvaluatedModel, FileModel
from edgetune.evaluation.results import EvaluationResults, EvaluationSettings
from edgetune.runs.directory import RunDirectory
from edgetune.runtime.artifacts import artifact_format, has_score_head
from edgetune.runtime.loading import load_text_model, require_file, reward_model_problem
from edgetune.validation.provenance import mismatches

LONGEST_CONTEXT = 4096
"""Default limit of the context: a model for 128k tokens would take gigabytes of cache for prompts of some hundred."""

OpenModel = Callable[[int | None], AbstractContextManager[EvaluatedModel]]
"""Opens a model with a context of so many tokens; None: its own, at most LONGEST_CONTEXT."""


@dataclass(frozen=True)
class EvaluationRequest:
    """What is to be evaluated."""

    tasks: tuple[str, ...]
    """Names of tasks, groups or tags."""
    include_paths: tuple[Path, ...] = ()
    """Folders with tasks of the user's own."""
    limit: int | None = None
    """Only the first documents of each task; None: all."""
    num_fewshot: int | None = None
    """Examples in the prompt; None: as each task says."""
    apply_chat_template: bool = False
    context: int | None = None
    """Tokens that a prompt and its answer may have together; None: the first model's own, at most LONGEST_CONTEXT."""
    models: Mapping[str, OpenModel] = field(default_factory=dict)
    """Name -> how it is opened. The first one determines the prompts of all."""


def file_opener(path: Path, threads: int | None, run: RunDirectory | None = None) -> OpenModel:
    """Return the function that opens an exported file, with a warning if it was not made from `run`.

    Raises:
        RuntimeProblem: The file does not exist, or is a reward model.
    """
    require_file(path)
    if artifact_format(path) == "gguf" and has_score_head(path):
        raise reward_model_problem(path)

    @contextmanager
    def open_file(context: int | None) -> Iterator[EvaluatedModel]:
        with load_text_model(path, threads=threads, context=context) as runtime:
            for mismatch in mismatches(runtime.metadata, run) if run else ():
                console.warn(f"{path.name}: {mismatch}")
            yield FileModel(runtime)

    return open_file


def evaluate_models(request: EvaluationRequest, run_name: str = "") -> EvaluationResults:
    """Evaluate the models one after another, each with the same prompts.

    Raises:
        EdgetuneError: For anything that a task or a model lacks; tasks are loaded before the first model is opened.
    """
    task_loading.require_harness()
    from edgetune.evaluation import harness
    from edgetune.evaluation.harness_model import PromptSettings

    loaded = task_loading.load_tasks(request.tasks, request.include_paths)
    for name in task_loading.set_num_fewshot(list(loaded["tasks"].values()), request.num_fewshot):
        console.warn(f"the task {name} states that it takes no examples, so --num-fewshot does not apply to it")
    task_loading.refuse_missing_examples(list(loaded["tasks"].values()))
    settings: PromptSettings | None = None
    scores = []
    for name, open_model in request.models.items():
        with open_model(settings.context if settings else request.context) as model:
            if settings is None:
                template = _template(model) if request.apply_chat_template else None
                settings = PromptSettings(model.context, model.prefix_token, template)
            if settings.context > model.trained_context:
                console.warn(
                    f"{name}: --context is {settings.context} tokens, and the model was made for "
                    f"{model.trained_context}"
                )
            with console.count_progress(f"evaluate {name}", announce=True) as progress:
                scores.append(harness.run_model(model, loaded, settings, request.limit, progress))
    assert settings is not None
    return EvaluationResults(
        edgetune=edgetune.__version__,
        harness=task_loading.harness_version(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        run=run_name,
        settings=EvaluationSettings(
            tasks=list(request.tasks),
            limit=request.limit,
            num_fewshot=request.num_fewshot,
            apply_chat_template=request.apply_chat_template,
            context=settings.context,
        ),
        models=[model.name for model in scores],
        requests=len(scores[0].prompt_digests),
        truncation=harness.truncations(scores),
        tasks=harness.combine(scores, loaded),
    )


def _template(model: EvaluatedModel) -> Any:
    if model.chat_template is None:
        raise ConfigError(f"{model.name} has no chat template", "Leave out --apply-chat-template")
    return model.chat_template
