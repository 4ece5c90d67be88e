"""What the files that a report reads must look like, as far as the report looks at them; other keys are left alone."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

Number = float | None
"""null stands for NaN and infinity."""


class _Shape(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class MeanShape(_Shape):
    """A mean with its standard error."""

    value: Number = None
    error: Number = None


class FiguresShape(_Shape):
    """validation.metrics.Figures."""

    tokens: int = 0
    cross_entropy: MeanShape = MeanShape()
    perplexity: MeanShape = MeanShape()
    kld: MeanShape = MeanShape()
    same_top: MeanShape = MeanShape()
    kld_percentiles: dict[str, Number] = {}
    kld_max: Number = None
    recovery: Number = None


class TaskShape(_Shape):
    """validation.task.TaskScore."""

    rows: int = 0
    right: int = 0
    share: Number = None
    same_as_trained: int | None = None
    first_miss: dict[str, str] | None = None


class DifferenceShape(_Shape):
    """validation.contract.Difference."""

    what: str
    detail: str


class ContractShape(_Shape):
    """validation.contract.Contract."""

    conversations: int = 0
    differences: list[DifferenceShape] = []


class HistogramShape(_Shape):
    """validation.detail.histogram."""

    edges: list[float]
    counts: list[int]


class CandidatesShape(_Shape):
    """[text, probability] of both models' likeliest tokens."""

    trained: list[tuple[str, float]]
    file: list[tuple[str, float]]


class RowShape(_Shape):
    """One of the worst rows (validation/detail.py)."""

    row: int
    length: int
    mean_kld: Number
    max_kld: Number
    first: int
    texts: list[str]
    kld: list[Number]
    p_trained: list[Number]
    p_file: list[Number]
    candidates: dict[str, CandidatesShape]


class DetailShape(_Shape):
    """validation.detail.detail."""

    kld_histogram: HistogramShape | None = None
    worst_percent_share: Number = None
    worst_rows: list[RowShape] = []


class SwapShape(_Shape):
    """validation.locate.Swap."""

    tensor: str
    type: str
    gain: Number


class LocatedShape(_Shape):
    """validation.locate.Located."""

    kld: Number
    kinds: list[SwapShape]
    layers: list[SwapShape] = []
    complete: bool = True


class LostShape(_Shape):
    """validation.blame.Lost."""

    stage: str
    kld: Number


class AgreementShape(_Shape):
    """validation.greedy.Agreement."""

    rows: int
    mean: Number
    whole: int


class LongRowShape(_Shape):
    """validation.rungs.LongRow."""

    tokens: int
    kld: Number


class _NamedShape(_Shape):
    name: str
    figures: FiguresShape


class RungShape(_NamedShape):
    """validation.ladder.Rung."""

    kind: str = ""
    file: str | None = None
    size: int | None = None
    is_quantized: bool = False
    task: TaskShape | None = None
    contract: ContractShape | None = None
    notes: list[str] = []
    mismatches: list[str] = []
    detail: DetailShape | None = None
    located: LocatedShape | None = None
    lost: LostShape | None = None
    agreement: AgreementShape | None = None
    long_rows: list[LongRowShape] = []


class MissShape(_Shape):
    """validation.gate.Miss."""

    rung: str = ""
    figure: str = ""
    stage: str = ""
    sentence: str = ""
    hint: str | None = None


class ReferenceShape(_Shape):
    """What was compared with."""

    rows: int = 0
    tokens: int = 0
    kld_is_lower_bound: bool = False


class _VersionedShape(_Shape):
    version: int
    rungs: list[RungShape]


class ValidationShape(_VersionedShape):
    """What `edgetune validate` writes."""

    created: str = ""
    reference: ReferenceShape = ReferenceShape()
    gate: dict[str, Number] = {}
    misses: list[MissShape] = []


class ReceiptShape(_Shape):
    """edgetune_converters.provenance.receipts.Receipt."""

    sha256: str = ""
    recipe: str = ""
    architecture: str = ""
    base: dict[str, str] | None = None
    adapter: dict[str, str] | None = None
    merge_base: str = ""
    merge_base_kld: dict[str, float] | None = None
    types: dict[str, int] = {}
    tensors: dict[str, str] = {}
    bits_per_weight: Number = None
    fallback_share: Number = None
    notes: list[str] = []
    survival: dict[str, float] | None = None
    overrides: list[str] = []
    files: dict[str, str] = {}
    imatrix: dict[str, str] | None = None
    versions: dict[str, str] = {}


class ConfigShape(_Shape):
    """The sections of the configuration that are shown."""

    name: str = ""
    adapter: dict[str, Any] = {}
    quantization: dict[str, Any] = {}
    training: dict[str, Any] = {}


class ManifestShape(_Shape):
    """run.json."""

    config: ConfigShape = ConfigShape()
    base: dict[str, Any] = {}
    device: dict[str, Any] = {}
    data: dict[str, list[Any]] = {}
    stages: dict[str, dict[str, Any]] = {}


def problem(shape: type[BaseModel], text: str) -> str | None:
    """What of a JSON text does not fit, in a few words; None when it fits."""
    try:
        shape.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return f"{place or 'it'}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    return None
