"""`merge-export --merge-base auto`: is the adapter added to the base as it is, or as it was rounded while training?

Neither is right for all models (published evidence conflicts), so both are exported in 8 bits, which cost next to
nothing beside the difference, and measured against what the trained model said on the run's held-out rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgetune.console import Progress
from edgetune.reference.codecs import F64
from edgetune.reference.store import Reference
from edgetune.runtime import load
from edgetune.validation import scoring
from edgetune.validation.metrics import Mean
from edgetune_converters.names import NF4, ORIGINAL

TYPE = "q8_0"
TOKENS = 2048
"""Scored tokens on which both are measured, at most."""
_SURE = 2.0  # standard errors

Make = Callable[[str, Path], object]
"""Writes the export with a merge base, by its name, to a GGUF file."""


@dataclass(frozen=True)
class Choice:
    """What was chosen, and the mean KL divergence from the trained model (nats per token) with each."""

    name: str
    kld: dict[str, Mean]

    @property
    def sentence(self) -> str:
        """The figures, and why the smaller one does not always decide."""
        said = ", ".join(f"{name} {mean.value:.3g} ± {mean.error:.1g}" for name, mean in self.kld.items())
        text = f"merge base {self.name}; mean KLD from the trained model, in 8 bits: {said}"
        if self.name == ORIGINAL and self.kld[NF4].value < self.kld[ORIGINAL].value:
            text += f"; {NF4} is not surely nearer (by less than two standard errors of the difference)"
        return text


def choose(make: Make, reference: Reference, folder: Path, progress: Progress) -> Choice:
    """Measure both. The base as it is keeps its precision, so it is left only for one that is surely nearer."""
    found: dict[str, F64] = {}
    for done, name in enumerate((ORIGINAL, NF4)):
        progress(done, 2)
        file = folder / f"{name}.gguf"
        make(name, file)
        found[name] = _kld(reference, file)
        file.unlink()
    gain = Mean.of(found[ORIGINAL] - found[NF4])
    is_nearer = bool(gain.value > _SURE * np.nan_to_num(gain.error, nan=np.inf))
    return Choice(NF4 if is_nearer else ORIGINAL, {name: Mean.of(each) for name, each in found.items()})


def _kld(reference: Reference, file: Path) -> F64:
    rows = reference.main_rows
    rows = rows.first(next((count for count, (_, _, at) in enumerate(rows, 1) if at.stop >= TOKENS), len(rows)))
    with load(file, context=int(max(len(ids) for ids, _, _ in rows))) as runtime:
        return scoring.score(runtime, reference, rows, lambda *_: None).kld
