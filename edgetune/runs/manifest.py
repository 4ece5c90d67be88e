"""run.json, the manifest of a run: how it was made, and the results of its stages."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from pydantic import Field

from edgetune.runs.documents import Document, DocumentSection, Number
from edgetune.runs.status import Stage


class BaseIdentity(DocumentSection):
    """The base model that a run was trained on."""

    name: str | None = None
    """As the configuration names it: a path or a repository of the hub."""
    path: str | None = None
    """The directory or GGUF file of the base on the machine of the training."""
    revision: str | None = None
    """The commit of a hub repository."""
    files: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of config.json and of the weights, by file name."""


class TrainResults(DocumentSection):
    """The results of the stage `train`. Losses are in nats per token."""

    steps: int = 0
    epochs: float = 0.0
    loss_first: Number = math.nan
    loss_last: Number = math.nan
    eval_loss: Number = math.nan
    metrics: dict[str, Number] = Field(default_factory=dict)
    """The objective's metrics in the last evaluation, such as reward_margin; none for SFT."""
    seconds: float = 0.0
    tokens_per_second: float | None = None
    trainable_parameters: int | None = None
    adapter_is_zero: bool = False
    rows: dict[str, Any] = Field(default_factory=dict)
    pad_token: str | None = None
    stop_tokens: list[str] = Field(default_factory=list)
    adapter: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of the adapter's files as training wrote them, by file name; empty in older manifests."""
    finished: str | None = None
    """ISO 8601, UTC."""


class Stages(DocumentSection):
    """The results of each stage that has finished."""

    train: TrainResults | None = None
    reference: dict[str, Any] | None = None
    """Only in runs of edgetune before 0.1."""

    def results(self, stage: Stage) -> dict[str, Any] | None:
        """Return the stored results of a stage as plain values; None if it has not finished."""
        stored: dict[str, Any] = self.model_dump(mode="json", exclude_unset=True)
        found: dict[str, Any] | None = stored.get(stage)
        return found


class AdoptedFrom(DocumentSection):
    """Where the adapter of a run comes from that another program trained."""

    path: str | None = None
    """The directory of the adapter."""
    trainer: str = "PEFT"
    """The program, as far as its files name it."""
    files: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of the adapter's files as they were found, by name."""
    arguments: list[str] = Field(default_factory=list)
    """The files of arguments that were read."""
    reasons: dict[str, str] = Field(default_factory=dict)
    """Why the base is in these bits, and why merge base, tokenizer and template are those that they are."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the training that edgetune does not have, under its names."""


class RunManifest(Document):
    """The manifest. Fields that were never set are not written."""

    KIND: ClassVar[str] = "a run manifest"
    HINT: ClassVar[str] = "Train again, or restore the file"

    version: int = Document.NEWEST
    config: dict[str, Any] = Field(default_factory=dict)
    """The resolved configuration; `edgetune.config.parse_config` reads it."""
    base: BaseIdentity = BaseIdentity()
    data: dict[str, Any] = Field(default_factory=dict)
    """The sources of each split with their SHA-256, the formats, and a digest of the encoded rows."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of the Python packages, by name."""
    device: dict[str, Any] = Field(default_factory=dict)
    """Type and name of the device of the training."""
    quantized: dict[str, Any] | None = None
    """Which linear layers were in 4 bits during training, and how; None for an unquantized base."""
    stages: Stages = Stages()
    adopted: AdoptedFrom | None = None
    """Set where `edgetune adopt` made the run around an adapter from elsewhere."""

    @property
    def rendered_at(self) -> str | None:
        """The time that the chat template printed into the rows (ISO 8601); None for one that does not ask for it."""
        found = self.data.get("rendered_at")
        return found if isinstance(found, str) else None

    @property
    def template_options(self) -> dict[str, Any]:
        """The options of the chat template; none in older manifests."""
        return dict(self.config.get("template", {}).get("options", {}))

    @property
    def captured_task(self) -> int | None:
        """The number of the task whose held-out rows the reference holds; None for a training without several tasks."""
        tasks = (self.config.get("adapter") or {}).get("tasks") or ()
        stated = (self.config.get("export") or {}).get("prompt_task")
        if not tasks:
            return None
        return tasks.index(stated) if isinstance(stated, str) else stated or 0

    def content(self) -> dict[str, Any]:
        """Return the manifest as plain JSON values, the version first, without the fields that were never set."""
        return {"version": self.version, **self.model_dump(mode="json", exclude_unset=True)}
