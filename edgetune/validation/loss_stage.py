"""Where on the way a loss happened: the first rung of a file's own chain that has it, and what to do next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgetune.validation.rungs import Ladder, Rung


@dataclass(frozen=True)
class Chain:
    """The rungs between the trained model and a file, as far as they were measured."""

    merged: Rung | None
    whole: Rung | None
    """The file before quantization: the same runtime's, if there is one."""
    file: Rung

    @classmethod
    def of(cls, ladder: Ladder, file: Rung) -> Chain:
        """For one file of the ladder."""
        merged = next((rung for rung in ladder.merged if rung.merge_base == (file.merge_base or "w16")), None)
        if not file.is_quantized:
            return cls(merged, None, file)
        whole = [rung for rung in ladder.files if not rung.is_quantized]
        alike = [rung for rung in whole if rung.is_onnx == file.is_onnx]
        return cls(merged, next(iter([*alike, *whole]), None), file)

    @property
    def rungs(self) -> list[Rung]:
        """Those that are there, in the order of the work."""
        return [rung for rung in (self.merged, self.whole, self.file) if rung is not None]


def stage_of(chain: Chain, misses: Callable[[Rung], bool]) -> str:
    """The step at which `misses` first holds; several, and how to tell them apart, where not all were measured."""
    if chain.merged is not None and misses(chain.merged):
        return "merge"
    before = "convert" if chain.merged is not None else "merge or convert"
    if not chain.file.is_quantized:
        return before
    if chain.whole is None:
        beside = "validate an f16 export beside it to tell which"
        return f"{'convert' if chain.merged else 'merge, convert'} or quantize ({beside})"
    if misses(chain.whole):
        return before
    return "quantize" if chain.whole.is_onnx == chain.file.is_onnx else "quantize or ONNX"


HINTS = {
    "origin": "Validate a file against the run that it was exported from, or export it again.",
    "template": "Export again from the run directory; its tokenizer/ holds the template of training.",
    "tokenizer": "Export again from the run directory; if it stays, this tokenizer cannot be shipped: report it.",
    "merge": "The merged model itself differs: compare --merge-base original and nf4 (`edgetune reference RUN --merged "
    "w16 --merged nf4` measures both).",
    "merge or convert": "`edgetune reference RUN --merged w16` tells a wrong merge from a wrong conversion.",
    "convert": "The merged weights are right and the file is not: export again; if it stays, report it.",
    "convert or quantize": "Export with -q f16 and validate that too: it tells a wrong conversion from a coarse type.",
    "merge, convert or quantize": "Export with -q f16 and validate that too: it tells a wrong merge from a type.",
    "quantize": "Export with a finer type (-q q5_k_m, q6_k or q8_0), or train longer; --locate names the tensors that "
    "cost most.",
    "quantize or ONNX": "Export f16 for ONNX and validate that too: it tells the graph from its types.",
}


def hint_of(stage: str) -> str:
    """What to do next about a loss at this stage."""
    return HINTS[stage.partition(" (")[0]]


@dataclass(frozen=True)
class StageLoss:
    """Where a file lost most of what it lost."""

    stage: str
    kld: float
    """Mean KL divergence that this step added, in nats."""
    hint: str


def largest_loss(ladder: Ladder, file: Rung) -> StageLoss:
    """The step of the chain that added most divergence."""
    chain = Chain.of(ladder, file)
    steps, before = [], ladder.trained.figures.kld.value
    for rung in chain.rungs:
        steps.append((rung.figures.kld.value - before, rung))
        before = rung.figures.kld.value
    added, rung = max(steps, key=lambda step: step[0])
    stage = stage_of(chain, lambda other: other is rung)
    return StageLoss(stage, added, hint_of(stage))
