"""evaluation.json: the scores of models on tasks of lm-evaluation-harness. Those who measure, print and report use it.

Numbers that are not defined are NaN in memory and null in JSON.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from edgetune.errors import RunDirectoryError
from edgetune.runs.documents import Document, DocumentSection, Number
from edgetune.runs.paths import RunPaths
from edgetune.validation.results import Mean

TRAINED = "trained"
"""The name of the trained model among the models."""
NAME_LENGTH = 60


class TaskMetric(DocumentSection):
    """One metric of a task."""

    name: str
    """As the harness calls it: acc, acc_norm, word_perplexity, exact_match, ..."""
    filter: str = "none"
    """The filter that the answers went through."""
    higher_is_better: bool | None = None
    """None where the task does not say."""
    scores: dict[str, Mean] = Field(default_factory=dict)
    """Score and standard error, by model."""
    differences: dict[str, Mean] = Field(default_factory=dict)
    """Score of a file minus that of the trained model. The standard error is that of the paired differences."""


class TaskScores(DocumentSection):
    """The scores of all models on one task, or on a group of tasks."""

    task: str
    version: str = ""
    is_group: bool = False
    documents: int = 0
    """Documents that were evaluated."""
    num_fewshot: int = 0
    metrics: list[TaskMetric] = Field(default_factory=list)


class EvaluationSettings(DocumentSection):
    """What was evaluated. Equal settings give equal prompts."""

    tasks: list[str]
    """Names as they were given: tasks, groups or tags."""
    limit: int | None = None
    """Only the first documents of each task."""
    num_fewshot: int | None = None
    """Examples in the prompt; None: as each task says."""
    apply_chat_template: bool = False
    context: int = 0
    """Tokens that a prompt and its answer may have together."""


class Truncation(DocumentSection):
    """What did not go to a model as the task wrote it."""

    prompts: int = 0
    """Prompts that were cut on the left, because they do not fit the context."""
    other_tokens: int = 0
    """Prompts that this model's tokenizer turns into other tokens than the trained model's."""


class EvaluationResults(Document):
    """Everything that one evaluation measured."""

    KIND: ClassVar[str] = "an evaluation"
    HINT: ClassVar[str] = "Evaluate again: the file is written anew"

    version: int = Document.NEWEST
    edgetune: str = ""
    harness: str = ""
    """Version of lm-evaluation-harness."""
    created: str = ""
    """ISO 8601, UTC."""
    run: str = ""
    """Name of the run; empty for a file alone."""
    settings: EvaluationSettings
    models: list[str]
    """`trained`, and the names of the exported files."""
    requests: int = 0
    """Prompts that each model was given."""
    truncation: dict[str, Truncation] = Field(default_factory=dict)
    """By model; a model without an entry was given every prompt as it is."""
    tasks: list[TaskScores]

    @property
    def files(self) -> list[str]:
        """The names of the exported files."""
        return [name for name in self.models if name != TRAINED]

    def digest(self) -> str:
        """Return a digest of what was asked, in 8 hexadecimal digits: another evaluation of it has the same."""
        asked = json.dumps([self.settings.model_dump(mode="json"), self.models], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()[:8]


def stored_path(run: RunPaths, results: EvaluationResults) -> Path:
    """Return the path in a run: `evaluations/TASKS-DIGEST.json`. The same evaluation, made again, replaces it."""
    tasks = re.sub(r"[^A-Za-z0-9_.+-]+", "_", "+".join(results.settings.tasks))[:NAME_LENGTH]
    return run.evaluations / f"{tasks}-{results.digest()}.json"


def read_evaluations(run: RunPaths) -> list[EvaluationResults]:
    """Read all evaluations that are stored in a run, the oldest first. Raises RunDirectoryError for a damaged one."""
    found = [EvaluationResults.read(path) for path in sorted(run.evaluations.glob("*.json"))]
    return sorted(found, key=lambda results: results.created)


def find_evaluations(artifact: Path) -> list[EvaluationResults]:
    """Return the evaluations of an exported file that lies in the `artifacts` of its run; none for another file."""
    run = RunPaths(artifact.resolve().parent.parent)
    if run.artifacts != artifact.resolve().parent or not run.evaluations.is_dir():
        return []
    try:
        return [results for results in read_evaluations(run) if artifact.name in results.models]
    except RunDirectoryError:
        return []


def remarks(results: EvaluationResults) -> list[str]:
    """Return what a reader of the scores has to know beside them."""
    found = []
    for name, each in results.truncation.items():
        if each.prompts:
            found.append(
                f"{name}: {each.prompts} of {results.requests} prompts do not fit the context of "
                f"{results.settings.context} tokens and were cut on the left"
            )
        if each.other_tokens:
            found.append(
                f"{name}: {each.other_tokens} of {results.requests} prompts have other token ids than those of "
                f"{results.models[0]}; see the contract of `edgetune validate`"
            )
    return found


def mean(value: Any, error: Any = math.nan) -> Mean:
    """Return a score and its error; what is no number ("N/A") is NaN."""
    return Mean(value=_number(value), error=_number(error))


def _number(value: Any) -> Number:
    is_number = isinstance(value, (int, float)) or hasattr(value, "__float__")
    return float(value) if is_number and not isinstance(value, (str, Mapping)) else math.nan
