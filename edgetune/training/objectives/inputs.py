"""What the trainer of every objective is made of, and what TRL's trainers must leave alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from transformers import TrainerCallback

from edgetune.planning.memory import TrainingLayout, layouts
from edgetune.planning.optimizers import OPTIMIZERS
from edgetune.planning.prepare import PreparedRun
from edgetune.training.adapters.selective import SelectiveModel
from edgetune.training.objectives.arguments import common_arguments


@dataclass(frozen=True)
class TrainerInputs:
    """What a trainer is made of."""

    model: Any
    """The base with a new adapter."""
    tokenizer: Any
    """The tokenizer of transformers, which knows the pad token."""
    prepared: PreparedRun
    directory: Path
    """Where checkpoints are written."""
    callbacks: Sequence[TrainerCallback] = ()
    layout: TrainingLayout | None = None
    """What the training keeps in memory; None: as little as the configuration allows."""

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of every trainer, and those of the objective under TRL's names."""
        config = self.prepared.config
        layout = self.layout or layouts(config)[-1]
        common = common_arguments(config, self.directory, checkpointing=layout.checkpointing)
        return {**common, **config.objective.trl_options()}

    def keywords(self) -> dict[str, Any]:
        """Return the arguments of the constructor that every trainer has."""
        return {"model": self.model, "processing_class": self.tokenizer, "callbacks": list(self.callbacks)}


class EncodedRowsTrainer:
    """A trainer of TRL on rows that are encoded already, without the model card that it writes into checkpoints."""

    model: Any
    args: Any

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing: the manifest of the run holds all of it."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if isinstance(self.model, SelectiveModel):
            self.model.load_trained(Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        named = str(getattr(self.args.optim, "value", self.args.optim))
        places = [place.split(":") for place in OPTIMIZERS[named].state_classes] if checkpoint else []
        with torch.serialization.safe_globals([getattr(import_module(module), name) for module, name in places]):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


class BaseAsReference:
    """A trainer of TRL whose reference model is the base: the model with its adapter switched off.

    It is asked for each batch, under the keys that TRL reads log-probabilities from that were computed before.
    """

    reference_keys: ClassVar[tuple[str, str]]
    reference_log_probs: tuple[torch.Tensor, ...]
    """Those of the last batch, by `reference_keys`."""

    def __init__(self, **keywords: Any) -> None:
        """Make the trainer without a second model, also where PEFT does not know the method that is trained."""
        model = keywords["model"]
        if not isinstance(model, PeftModel):
            keywords["args"].precompute_ref_log_probs = True  # or TRL loads the base a second time
        with adapter_off_as_reference(model):
            super().__init__(**keywords)
        self.precompute_ref_logps = True

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        own: Any = self
        with own.accelerator.unwrap_model(own.model).disable_adapter():
            found = own.compute_ref_log_probs(own.model, inputs)
        self.reference_log_probs = found
        inputs = {**inputs, **dict(zip(self.reference_keys, found, strict=True))}
        return super()._compute_loss(model, inputs, return_outputs)  # type: ignore[misc]


@contextmanager
def adapter_off_as_reference(model: Any) -> Iterator[None]:
    """Keep TRL from adding a copy of the new adapter, which it would use as the reference model.

    Without the copy TRL switches the adapter off. A new adapter changes nothing, so both are the base; PEFT has kinds
    of adapters that cannot be copied.
    """
    get_parameter = model.get_parameter
    model.add_adapter = lambda name, config: None
    model.get_parameter = lambda name: get_parameter(name.replace(".ref.", ".default."))
    try:
        yield
    finally:
        del model.add_adapter, model.get_parameter


def pad_right(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Return rows as int64 [rows, longest], padded with `value` on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.int64)
