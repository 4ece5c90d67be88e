"""The objectives of training: what is learned from the rows.

To add an objective: a module here with its options and facts, its class in OBJECTIVES, and its trainer in
`edgetune.training.objectives`. Nothing here imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgetune.objectives.base import Objective
from edgetune.objectives.sft import Sft
from edgetune.section import kind_of, one_of

OBJECTIVES: dict[str, type[Objective]] = {kind_of(objective): objective for objective in (Sft,)}
"""The objectives by `objective.kind`; the first is the default."""

if TYPE_CHECKING:
    ObjectiveConfig = Objective
else:
    ObjectiveConfig = one_of(list(OBJECTIVES.values()))

__all__ = ["OBJECTIVES", "Objective", "ObjectiveConfig", "Sft"]
