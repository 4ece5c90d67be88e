"""The optimizers of `training.optimizer`: what they keep for each parameter, and what they need."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgetune.errors import ConfigError, EnvironmentProblem
from edgetune.methods.freeze import Freeze
from edgetune.methods.full import Full
from edgetune.methods.llama_pro import LlamaPro

if TYPE_CHECKING:
    from edgetune.config import Config

_GALORE = ("rank", "update_proj_gap", "scale", "proj_type")
_APOLLO = (*_GALORE, "proj", "scale_type")
_GALORE_STATE = ("galore_torch.galore_projector:GaLoreProjector",)
_APOLLO_STATE = ("apollo_torch.random_projector:GradientProjector", "apollo_torch.svd_projector:GaLoreProjector")
_TRAINS_MATRICES = (Full, Freeze, LlamaPro)


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of transformers."""

    bytes: float
    """Bytes of its state for each trained parameter, or an upper bound."""
    package: str | None = None
    """The package that has it, beside torch and bitsandbytes."""
    options: tuple[str, ...] = ()
    """Its options in `training.optimizer_options`."""
    state_classes: tuple[str, ...] = ()
    """The classes of its state beside tensors, as MODULE:CLASS, which a checkpoint is read with."""

    @property
    def projects(self) -> bool:
        """Whether it projects the gradients of whole matrices (GaLore, APOLLO)."""
        return self.package is not None


OPTIMIZERS: Mapping[str, Optimizer] = {
    "paged_adamw_8bit": Optimizer(2),
    "paged_adamw_32bit": Optimizer(8),
    "adamw_torch": Optimizer(8),
    "adamw_8bit": Optimizer(2),
    "adafactor": Optimizer(1),
    "lion_32bit": Optimizer(4),
    "paged_lion_8bit": Optimizer(1),
    "ademamix": Optimizer(12),
    "sgd": Optimizer(0),
    "galore_adamw": Optimizer(8, "galore_torch", _GALORE, _GALORE_STATE),
    "galore_adafactor": Optimizer(4, "galore_torch", _GALORE, _GALORE_STATE),
    "apollo_adamw": Optimizer(8, "apollo_torch", _APOLLO, _APOLLO_STATE),
}
"""The optimizers by `training.optimizer`, as transformers names them."""


def check_optimizer(config: Config) -> None:
    """Check the optimizer, its options and its package.

    Raises:
        ConfigError: Options contradict the optimizer, or the method trains no matrices that it could project.
        EnvironmentProblem: Its package is missing.
    """
    training = config.training
    chosen = OPTIMIZERS[training.optimizer]
    problems = list(_problems(config, chosen))
    if problems:
        raise ConfigError.of_many(
            "problems in training", problems, "Correct training.optimizer and the options that belong to it"
        )
    if chosen.package and importlib.util.find_spec(chosen.package) is None:
        name = chosen.package.replace("_", "-")
        raise EnvironmentProblem(
            f"training.optimizer: {training.optimizer} needs {name}, which is not installed",
            "Run `pip install 'edgetune[optimizers]'`, or choose another training.optimizer",
        )


def _problems(config: Config, chosen: Optimizer) -> Iterator[str]:
    training = config.training
    named = training.optimizer
    if unknown := sorted(training.optimizer_options.keys() - set(chosen.options)):
        known = f"known are {', '.join(chosen.options)}" if chosen.options else "it has none here"
        yield f"training.optimizer_options: {named} has no option {', '.join(unknown)}; {known}"
    if not chosen.projects:
        if training.optimizer_modules != "all-linear":
            yield f"training.optimizer_modules: {named} treats all layers alike; leave it out"
        return
    if not isinstance(config.adapter, _TRAINS_MATRICES):
        yield (
            f"training.optimizer: {named} projects the gradients of whole matrices, and adapter.kind: "
            f"{config.adapter.kind} trains none; use it with full, freeze or llama-pro"
        )
