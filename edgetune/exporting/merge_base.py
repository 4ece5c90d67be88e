"""Merge base `auto`: measure whether the adapter fits the base as it is stored, or quantized to NF4 as in training.

Published evidence on the two conflicts. Both are therefore exported in 8 bits, whose own error is negligible beside
the difference, and their divergence from the trained model is measured on the run's held-out rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune import console
from edgetune.errors import ConfigError
from edgetune_converters.files.atomic import temporary_directory
from edgetune_converters.names import MERGE_BASES, NF4, ORIGINAL, MergeBaseName

if TYPE_CHECKING:
    from edgetune.exporting.source import Source
    from edgetune.reference.codecs import F64
    from edgetune.reference.store import Reference
    from edgetune.validation.results import Mean
    from edgetune_converters.request import ExportRequest

TRIAL_TYPE = "q8_0"
_SIGNIFICANT = 2.0  # standard errors of the difference


@dataclass(frozen=True)
class MergeBaseComparison:
    """The mean KL divergence from the trained model, in nats per token, with each merge base."""

    best: MergeBaseName
    """NF4 only if it is significantly closer, because the base as it is stored keeps its precision."""
    kld: dict[MergeBaseName, Mean]

    @property
    def sentence(self) -> str:
        """Return the figures, and why the smaller one does not always decide."""
        figures = ", ".join(f"{name} {mean.value:.3g} ± {mean.error:.1g}" for name, mean in self.kld.items())
        text = f"merge base {self.best}; mean KLD from the trained model, in 8 bits: {figures}"
        if self.best == ORIGINAL and self.kld[NF4].value < self.kld[ORIGINAL].value:
            text += f"; {NF4} is not significantly closer (less than two standard errors of the difference)"
        return text


def with_measured_merge_base(request: ExportRequest, source: Source) -> ExportRequest:
    """Return the request with the merge base that is closer to the trained model, and the divergences of both.

    Raises:
        ConfigError: There is no run to measure on.
    """
    if source.run is None:
        raise ConfigError(
            "--merge-base auto measures on the held-out rows of a run, and no run is given",
            "Give a run directory, or --merge-base original or nf4",
        )
    if source.bnb_record is None:
        console.note("merge base original: the run was trained on the unquantized base")
        return replace(request, merge_base=ORIGINAL)
    from edgetune.reference.store import Reference

    found = compare_merge_bases(request, Reference.open(source.run.reference))
    console.note(found.sentence)
    klds: dict[str, float] = {name: mean.value for name, mean in found.kld.items()}
    return replace(request, merge_base=found.best, merge_base_kld=klds)


def compare_merge_bases(request: ExportRequest, reference: Reference) -> MergeBaseComparison:
    """Export and measure with each merge base, in a temporary directory beside the first target."""
    import numpy as np

    from edgetune.validation.metrics import mean_of

    klds: dict[MergeBaseName, F64] = {}
    with (
        temporary_directory(request.targets[0].path.resolve(), ".merge-base.partial") as folder,
        console.count_progress("merge base") as progress,
    ):
        for done, name in enumerate(MERGE_BASES):
            progress(done, len(MERGE_BASES))
            klds[name] = _measure(request, name, reference, folder / f"{name}.gguf")
    gain = mean_of(klds[ORIGINAL] - klds[NF4])
    is_closer = bool(gain.value > _SIGNIFICANT * np.nan_to_num(gain.error, nan=np.inf))
    return MergeBaseComparison(NF4 if is_closer else ORIGINAL, {name: mean_of(kld) for name, kld in klds.items()})


def _measure(request: ExportRequest, name: MergeBaseName, reference: Reference, file: Path) -> F64:
    from edgetune.sensitivity.divergence import token_klds, trial_rows
    from edgetune_converters.exporting import export
    from edgetune_converters.quantization.overrides import NONE
    from edgetune_converters.request import Target

    trial = request.for_trial(Target("gguf", TRIAL_TYPE, file))
    export(replace(trial, merge_base=name, overrides=NONE, imatrix=None, allow_fallback=True))
    klds = token_klds(reference, trial_rows(reference), file)
    file.unlink()
    return klds
