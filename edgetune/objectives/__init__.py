"""The objectives of training: what is learned from the rows.

To add an objective: a module here with its options and facts, its class in OBJECTIVES, and its trainer in
`edgetune.training.objectives`. Nothing here imports torch.
"""

from __future__ import annotations

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

SCORERS = frozenset(kind for kind, objective in OBJECTIVES.items() if objective.facts.is_scorer)
"""Kinds whose trained model gives a score in place of a text."""

if TYPE_CHECKING:
    ObjectiveConfig = Objective
else:
    ObjectiveConfig = one_of(list(OBJECTIVES.values()))

__all__ = ["OBJECTIVES", "SCORERS", "Batching", "Objective", "ObjectiveConfig", "ObjectiveMetric", "Sft"]
