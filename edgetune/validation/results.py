"""validation.json: the results of `edgetune validate`. The classes that measure, report and print all use these models.

Numbers that are not defined are NaN in memory and null in JSON. KL divergences are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from edgetune.runs.documents import Document, DocumentSection, Number, OptionalNumber

SUFFIX = ".validation.json"


def results_path(artifact: Path) -> Path:
    """Return the path of the results of an exported file: model.gguf.validation.json."""
    return artifact.with_name(artifact.name + SUFFIX)


# -- figures of one model ----------------------------------------------------------------------------------------------


class Mean(DocumentSection):
    """A mean and its standard error."""

    value: Number = math.nan
    error: Number = math.nan


class Figures(DocumentSection):
    """One model compared with the reference, which is the trained model (or the base of a llama.cpp file)."""

    tokens: int = 0
    cross_entropy: Mean = Mean()
    """Nats per token."""
    perplexity: Mean = Mean()
    perplexity_trained: Mean = Mean()
    """The reference's own, on the same tokens."""
    perplexity_ratio: Mean = Mean()
    """Over the reference's; the error takes their covariance into account."""
    log_perplexity_ratio: Mean = Mean()
    perplexity_difference: Mean = Mean()
    """Minus the reference's; the error takes their covariance into account."""
    correlation: Number = math.nan
    """Of the log-probabilities that both models give to the tokens of the text; NaN for a constant one."""
    kld: Mean = Mean()
    """Nats per token; NaN where it was not measured."""
    kld_percentiles: dict[str, Number] = Field(default_factory=dict)
    kld_min: Number = math.nan
    kld_max: Number = math.nan
    same_top: Mean = Mean()
    """Share of tokens with the same most likely token."""
    delta_p: Mean = Mean()
    """Mean change of the probability of the token of the text."""
    delta_p_rms: Number = math.nan
    delta_p_rms_error: Number = math.nan
    delta_p_min: Number = math.nan
    delta_p_max: Number = math.nan
    delta_p_percentiles: dict[str, Number] = Field(default_factory=dict)
    recovery: OptionalNumber = None
    """Share of the training gain over the base that survives; None where training gained nothing on these rows."""


# -- contract, task, greedy answers, long rows -------------------------------------------------------------------------


class Difference(DocumentSection):
    """The first difference in one respect of the contract."""

    what: str
    """template, rendering, BOS, tokens or stop."""
    detail: str


class Contract(DocumentSection):
    """Whether a file renders, tokenizes and stops as training did."""

    conversations: int = 0
    differences: list[Difference] = Field(default_factory=list)
    holds: bool = True

    @model_validator(mode="after")
    def _set_holds(self) -> Self:
        self.holds = not self.differences
        return self

    def with_difference(self, what: str, detail: str | None) -> Contract:
        """Return the contract with one more difference, if there is one."""
        if detail is None:
            return self
        return Contract(
            conversations=self.conversations, differences=[*self.differences, Difference(what=what, detail=detail)]
        )


class TaskScore(DocumentSection):
    """The number of correct answers, and the first wrong one."""

    rows: int = 0
    right: int = 0
    same_as_trained: int | None = None
    """Answers that equal the trained model's, character for character."""
    first_miss: dict[str, str] | None = None
    """{"prompt", "expected", "got"} of the first row that the trained model answers correctly and this one does not."""
    share: Number = math.nan
    """Correct answers per row."""

    @model_validator(mode="after")
    def _set_share(self) -> Self:
        self.share = self.right / self.rows if self.rows > 0 else math.nan
        return self


class Agreement(DocumentSection):
    """Agreement with the trained model's greedy answers, token by token. A stop counts as a token."""

    rows: int
    mean: Number
    """Mean over the answers of the share of equal tokens, from the start."""
    whole: int
    """Answers that are equal to the end."""


class ScoreFigures(DocumentSection):
    """Scores of a reward model on held-out pairs, beside those of the trained model."""

    pairs: int = 0
    mean_difference: Number = math.nan
    """Mean absolute difference of a score, over both answers of all pairs."""
    max_difference: Number = math.nan
    correlation: Number = math.nan
    """Pearson's; NaN for constant scores."""
    accuracy: Number = math.nan
    """Share of the pairs whose chosen answer has the higher score."""
    trained_accuracy: Number = math.nan
    flips: Number = math.nan
    """Share of the pairs whose order is another one than the trained model's."""
    trained_spread: Number = math.nan
    """Standard deviation of the trained model's scores."""


class HiddenRows(DocumentSection):
    """The probability that the rows which a soft prompt adds to the vocabulary take at the scored positions.

    The other figures leave these rows out, as training had none; a program other than edgetune does not.
    """

    rows: int
    mean: Number = math.nan
    """Mean share of the probability."""
    largest: Number = math.nan
    """Largest share at one position."""
    divergence: Number = math.nan
    """How much larger the mean KL divergence is with these rows, in nats per token."""


class LongRow(DocumentSection):
    """A row that tests a long context."""

    tokens: int
    kld: Number = math.nan
    """Mean over its scored tokens."""
    same_top: Number = math.nan


# -- detail of one file ------------------------------------------------------------------------------------------------


class Histogram(DocumentSection):
    """`counts` [n] between `edges` [n + 1]."""

    edges: list[float]
    counts: list[int]


class Candidates(DocumentSection):
    """The most likely tokens of both models at one position, as (text, probability)."""

    trained: list[tuple[str, float]]
    file: list[tuple[str, float]]


class WorstRow(DocumentSection):
    """A window of a row with a large divergence. The columns have one entry per token, NaN for an unscored one."""

    row: int
    """Index among the held-out rows."""
    length: int
    """Tokens of the whole row."""
    mean_kld: Number
    max_kld: Number
    first: int
    """Position of the window's first token in the row."""
    texts: list[str]
    kld: list[Number]
    p_trained: list[Number]
    p_file: list[Number]
    candidates: dict[str, Candidates]
    """By the index into the columns."""


class KldDetail(DocumentSection):
    """The distribution of a file's KL divergences, and the rows where they are largest."""

    kld_histogram: Histogram | None = None
    worst_percent_share: OptionalNumber = None
    """The share of all divergence in the worst hundredth of the tokens; None if all is 0."""
    worst_rows: list[WorstRow] = Field(default_factory=list)


class TensorCost(DocumentSection):
    """The cost of the quantization of some tensors, measured by storing them in 16 bits."""

    tensor: str
    """Their name; `*` stands for every layer."""
    type: str
    """Their storage type in the file."""
    weights: int = 0
    kld_without: Number = math.nan
    """Mean KL divergence with the tensors in 16 bits."""
    gain: Number
    """How much smaller that is."""


class TensorCosts(DocumentSection):
    """Which tensors' storage types cost most, the worst first: kinds of tensors, then layers of the worst kind."""

    kld: Number
    """Mean KL divergence of the file, on the tokens of this measurement."""
    kinds: list[TensorCost]
    layers: list[TensorCost] = Field(default_factory=list)
    complete: bool = True
    """Whether the time was enough for all of them."""


class StageLoss(DocumentSection):
    """The stage that adds most divergence."""

    stage: str
    kld: Number = math.nan
    """The mean KL divergence that the stage adds."""
    hint: str = ""


# -- rungs, misses, the document ---------------------------------------------------------------------------------------

BASE, TRAINED, MERGED, FILE = "base", "trained", "merged", "file"
_STAGES = {BASE: "base", TRAINED: "trained", MERGED: "merge"}


class Rung(DocumentSection):
    """One model of the ladder. The fields after `kind` are of exported files only, unless they say otherwise."""

    name: str
    figures: Figures
    task: TaskScore | None = None
    """Of every rung but the merged ones."""
    scores: ScoreFigures | None = None
    """Of the trained model and the files, if it is a reward model."""
    hidden: HiddenRows | None = None
    """Of a file with a soft prompt that adds rows to the vocabulary."""
    kind: str = FILE
    file: str | None = None
    """The name of the file; the results may be read on another machine, so its directory is not stored."""
    size: int | None = None
    """Bytes; of an ONNX directory, all of them."""
    contract: Contract | None = None
    is_quantized: bool = False
    notes: list[str] = Field(default_factory=list)
    mismatches: list[str] = Field(default_factory=list)
    """Bases or adapters that the file was made from and that are not this run's; one fails the gate."""
    detail: KldDetail | None = None
    merge_base: str | None = None
    """What the adapter was merged into: "original" or "nf4". Of merged models and of files."""
    is_onnx: bool = False
    agreement: Agreement | None = None
    long_rows: list[LongRow] = Field(default_factory=list)
    """Of merged models and of files."""
    row_kld: list[Number] = Field(default_factory=list)
    """Mean KL divergence of each held-out row, of every rung; NaN for a row without a scored token."""
    located: TensorCosts | None = None
    stage: str = ""
    """The stage whose output this is: base, trained, merge, convert or quantize."""
    lost: StageLoss | None = None
    meaning: list[str] = Field(default_factory=list)
    """What the figures mean, where that is not plain."""
    path: Path | None = Field(default=None, exclude=True)
    """The file on this machine, while it is being validated."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        converted = "quantize" if self.is_quantized else "convert"
        self.stage = _STAGES.get(self.kind, converted)
        if self.merge_base == "w16":  # "original" in results of edgetune before 0.1
            self.merge_base, self.name = "original", self.name.replace("merged w16", "merged original")
        return self


class Miss(DocumentSection):
    """A threshold or a check that a file misses."""

    rung: str = ""
    figure: str = ""
    """The key of the threshold, "contract" or "origin"."""
    stage: str = ""
    """Where it was lost: template, tokenizer, merge or convert, quantize."""
    sentence: str = ""
    value: Number = math.nan
    limit: Number = math.nan
    is_maximum: bool | None = None
    hint: str | None = None
    """What to do next."""


class Unmeasured(DocumentSection):
    """A threshold that is set and was not measured, so that the gate cannot be passed."""

    rung: str
    figure: str
    """The key of the threshold."""
    reason: str
    """What was left out, in a sentence."""


class ReferenceFacts(DocumentSection):
    """The reference that the files were compared with."""

    rows: int = 0
    tokens: int = 0
    vocabulary: int = 0
    caution: str | None = None
    """What a sample of this size cannot show; None if it is large enough."""
    coding: str = ""
    kld_is_lower_bound: bool = False
    info: dict[str, Any] = Field(default_factory=dict)


class ValidationResults(Document):
    """Everything that one validation measured, and whether the files pass the gate."""

    KIND: ClassVar[str] = "a validation report"
    HINT: ClassVar[str] = "Validate the file again: its report is written anew"

    version: int = Document.NEWEST
    edgetune: str = ""
    created: str = ""
    """ISO 8601, UTC."""
    run: str = ""
    reference: ReferenceFacts = ReferenceFacts()
    passed: bool | None = None
    """None if a threshold was not measured and none is missed. True says little where no threshold is set (`gate`)."""
    gate: dict[str, OptionalNumber] = Field(default_factory=dict)
    """The thresholds; None for one that is not set."""
    misses: list[Miss] = Field(default_factory=list)
    unmeasured: list[Unmeasured] = Field(default_factory=list)
    rungs: list[Rung]

    @property
    def is_judged(self) -> bool:
        """Whether a threshold is set: without one, only contract and origin are checked."""
        return any(limit is not None and math.isfinite(limit) for limit in self.gate.values())

    @property
    def files(self) -> list[Rung]:
        """The exported files."""
        return [rung for rung in self.rungs if rung.file]

    @property
    def stored(self) -> list[Rung]:
        """The rungs that come from the reference: base, trained, and the merged models that were captured."""
        return [rung for rung in self.rungs if not rung.file]

    def rung(self, name: str) -> Rung | None:
        """Return the rung of this name, if there is one."""
        return next((rung for rung in self.rungs if rung.name == name), None)

    def misses_of(self, name: str) -> list[Miss]:
        """Return the thresholds and checks that one file misses."""
        return [miss for miss in self.misses if miss.rung == name]

    def unmeasured_of(self, name: str) -> list[Unmeasured]:
        """Return the thresholds that were not measured for one file."""
        return [each for each in self.unmeasured if each.rung == name]

    def for_files(self, names: Collection[str]) -> ValidationResults:
        """Return the results of some of the files: what stands beside each of them."""
        misses = [miss for miss in self.misses if miss.rung in names]
        unmeasured = [each for each in self.unmeasured if each.rung in names]
        return self.model_copy(
            update={
                "passed": outcome(misses, unmeasured),
                "misses": misses,
                "unmeasured": unmeasured,
                "rungs": [rung for rung in self.rungs if not rung.file or rung.name in names],
            }
        )


def outcome(misses: Collection[Miss], unmeasured: Collection[Unmeasured]) -> bool | None:
    """Return whether the gate is passed: False for a miss, None where a threshold was not measured."""
    return False if misses else None if unmeasured else True
