"""The stage that lost fidelity: the first rung of a file's own chain that shows the loss, and what to do next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgetune.validation.results import MERGED, TRAINED, Rung, StageLoss


@dataclass(frozen=True)
class Chain:
    """The rungs between the trained model and a file, as far as they were measured."""

    merged: Rung | None
    unquantized: Rung | None
    """The file before quantization: one of the same runtime, if there is one."""
    file: Rung

    @classmethod
    def of(cls, rungs: Sequence[Rung], file: Rung) -> Chain:
        """Return the chain of one file of the ladder."""
        merge_base = file.merge_base or "original"
        merged = next((rung for rung in rungs if rung.kind == MERGED and rung.merge_base == merge_base), None)
        if not file.is_quantized:
            return cls(merged, None, file)
        unquantized = [rung for rung in rungs if rung.file and not rung.is_quantized]
        same_runtime = [rung for rung in unquantized if rung.is_onnx == file.is_onnx]
        return cls(merged, next(iter([*same_runtime, *unquantized]), None), file)

    @property
    def rungs(self) -> list[Rung]:
        """The rungs that were measured, in the order of the work."""
        return [rung for rung in (self.merged, self.unquantized, self.file) if rung is not None]


def stage_of(chain: Chain, misses: Callable[[Rung], bool]) -> str:
    """Return the stage at which `misses` first holds.

    Where not every rung was measured, several stages are possible: all are named, with the way to tell them apart.
    """
    if chain.merged is not None and misses(chain.merged):
        return "merge"
    before = "convert" if chain.merged is not None else "merge or convert"
    if not chain.file.is_quantized:
        return before
    if chain.unquantized is None:
        stages = "convert" if chain.merged else "merge, convert"
        return f"{stages} or quantize (validate an f16 export as well to tell which)"
    if misses(chain.unquantized):
        return before
    return "quantize" if chain.unquantized.is_onnx == chain.file.is_onnx else "quantize or ONNX"


HINTS = {
    "origin": "Validate a file against the run that it was exported from, or export it again",
    "template": "Export again from the run directory: its tokenizer/ holds the template of the training",
    "tokenizer": "Export again from the run directory. If the difference remains, this tokenizer is not supported: "
    "please report it",
    "merge": "The merged model itself differs: compare --merge-base original and nf4 (`edgetune reference RUN --merged "
    "original --merged nf4` measures both)",
    "merge or convert": "Measure the merged model to tell the two apart: `edgetune reference RUN --merged original`",
    "convert": "The merged weights are right and the file is not: export again. If the loss remains, please report it",
    "convert or quantize": "Export with -q f16 and validate that file too: it tells a wrong conversion from a coarse "
    "storage type",
    "merge, convert or quantize": "Export with -q f16 and validate that file too: it tells a wrong merge from a coarse "
    "storage type",
    "quantize": "Export a finer storage type (-q q5_k_m, q6_k or q8_0), or train longer; --locate names the tensors "
    "that cost most",
    "quantize or ONNX": "Export f16 for ONNX and validate that too: it tells the graph from the storage types",
}


def hint_of(stage: str) -> str:
    """Return what to do next about a loss at this stage."""
    return HINTS[stage.partition(" (")[0]]


def largest_loss(rungs: Sequence[Rung], file: Rung) -> StageLoss:
    """Return the stage of the file's chain that adds most divergence."""
    chain = Chain.of(rungs, file)
    before = next(rung.figures.kld.value for rung in rungs if rung.name == TRAINED)
    steps = []
    for rung in chain.rungs:
        steps.append((rung.figures.kld.value - before, rung))
        before = rung.figures.kld.value
    added, largest = max(steps, key=lambda step: step[0])
    stage = stage_of(chain, lambda rung: rung is largest)
    return StageLoss(stage=stage, kld=added, hint=hint_of(stage))
