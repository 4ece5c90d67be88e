"""The objectives of training: what is learned from the rows.

To add an objective: a module here with its options and facts, its class in OBJECTIVES, and its trainer in
`edgetune.training.objectives`. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgetune.objectives.base import Batching, Objective, ObjectiveMetric
from edgetune.objectives.cpo import Cpo
from edgetune.objectives.distillation import Distillation
from edgetune.objectives.dpo import Dpo
from edgetune.objectives.grpo import Grpo
from edgetune.objectives.ipo import Ipo
from edgetune.objectives.kto import Kto
from edgetune.objectives.orpo import Orpo
from edgetune.objectives.pretrain import Pretrain
from edgetune.objectives.reward import RewardModel
from edgetune.objectives.rloo import Rloo
from edgetune.objectives.sft import Sft
from edgetune.objectives.simpo import Simpo
from edgetune.section import kind_of, one_of

_ALL: tuple[type[Objective], ...] = (
    Sft,
    Pretrain,
    Dpo,
    Ipo,
    Kto,
    Orpo,
    Cpo,
    Simpo,
    RewardModel,
    Grpo,
    Rloo,
    Distillation,
)
OBJECTIVES: dict[str, type[Objective]] = {kind_of(objective): objective for objective in _ALL}
"""The objectives by `objective.kind`; the first is the default."""

OTHER_NAMES: Mapping[str, str] = {
    "ppo": "PPO trains a value model beside the model, which edgetune does not; use grpo or rloo",
    "rlhf": "use grpo or rloo with rewards, or dpo with preference pairs",
    "rm": "use reward",
    "slic": "SLiC is objective.kind: dpo with objective.loss_type: hinge",
    "rpo": "RPO is objective.kind: dpo with objective.sft_weight above 0",
    "bco": "BCO is objective.kind: dpo with objective.loss_type: bco_pair",
    "gkd": "use distillation with a local teacher",
    "kd": "use distillation",
    "cpt": "continued pretraining is objective.kind: pretrain",
    "pt": "continued pretraining is objective.kind: pretrain",
}
"""Other names of objectives -> what to set."""

SCORERS = frozenset(kind for kind, objective in OBJECTIVES.items() if objective.facts.is_scorer)
"""Kinds whose trained model gives a score in place of a text."""

if TYPE_CHECKING:
    ObjectiveConfig = Objective
else:
    ObjectiveConfig = one_of(list(OBJECTIVES.values()))

__all__ = ["OBJECTIVES", "OTHER_NAMES", "SCORERS", "Batching", "Objective", "ObjectiveConfig", "ObjectiveMetric", "Sft"]
