"""What is measured: rungs, from the base by way of the trained and the merged model to the exported files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.reference.scored_rows import ScoredRows
from edgetune.reference.store import Reference
from edgetune.runs.directory import RunDirectory
from edgetune.validation.contract import Contract
from edgetune.validation.greedy import Agreement
from edgetune.validation.metrics import Figures
from edgetune.validation.task import TaskScore
from edgetune.validation.tensor_costs import TensorCosts

BASE, TRAINED, MERGED, FILE = "base", "trained", "merged", "file"


@dataclass(frozen=True)
class LongRow:
    """A row that is there for its length."""

    tokens: int
    kld: float
    """Mean over its scored tokens, in nats."""
    same_top: float


@dataclass(frozen=True)
class Rung:
    """One model of the ladder; what stands after `task` is of exported files only."""

    name: str
    figures: Figures
    task: TaskScore | None
    kind: str = FILE
    file: Path | None = None
    size: int | None = None
    """Bytes; of an ONNX folder, all of them."""
    contract: Contract | None = None
    is_quantized: bool = False
    notes: tuple[str, ...] = ()
    mismatches: tuple[str, ...] = ()
    """What the file says it was made from and this run is not; one fails the gate whatever the figures are."""
    detail: Mapping[str, Any] | None = None
    """How the KL divergences of a file are spread, and its worst rows (validation/detail.py)."""
    merge_base: str | None = None
    """What the adapter was added to, as the file says: a name of `edgetune.reference.merged`."""
    is_onnx: bool = False
    agreement: Agreement | None = None
    """With the trained model's greedy answers."""
    long_rows: tuple[LongRow, ...] = ()
    row_kld: tuple[float, ...] = ()
    """Mean KL divergence of each held-out row, in nats; NaN for a row without a scored token."""

    located: TensorCosts | None = None
    """What the quantization of its tensors costs, where `--locate` measured it."""

    @property
    def stage(self) -> str:
        """The step at whose end this rung stands."""
        if self.kind != FILE:
            return {BASE: "base", TRAINED: "trained", MERGED: "merge"}[self.kind]
        return "quantize" if self.is_quantized else "convert"


@dataclass(frozen=True)
class Ladder:
    """Everything that was measured."""

    run: RunDirectory
    reference: Reference
    rows: ScoredRows
    rungs: list[Rung]
    """base, trained, the merged models that were captured, then the files in the order given."""

    @property
    def base(self) -> Rung:
        """The model before training."""
        return self.rungs[0]

    @property
    def trained(self) -> Rung:
        """The model as it was trained: what the others are compared with."""
        return self.rungs[1]

    @property
    def merged(self) -> list[Rung]:
        """The merged models before they were converted."""
        return [rung for rung in self.rungs if rung.kind == MERGED]

    @property
    def files(self) -> list[Rung]:
        """The exported files."""
        return [rung for rung in self.rungs if rung.kind == FILE]
