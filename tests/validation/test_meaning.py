"""What figures mean: a sentence for each kind of outcome, and none within its border."""

from __future__ import annotations

import io
from typing import Any

import pytest

from edgetune.validation.meaning import explain
from edgetune.validation.results import BASE, MERGED, TRAINED, Figures, Mean, Rung, StageLoss, ValidationResults
from edgetune.validation.table import format_table

GAIN = Mean(value=0.5, error=0.01)


def _figures(
    recovery: float | None = 1.0, same_top: float = 0.99, kld: float = 0.01, perplexity: float = 7.4
) -> Figures:
    return Figures(
        recovery=recovery,
        same_top=Mean(value=same_top),
        kld=Mean(value=kld),
        perplexity=Mean(value=perplexity),
        cross_entropy=Mean(value=2.0),
        kld_percentiles={"99": 0.1},
    )


def _ladder(file: Rung, *more: Rung, gain: Mean = GAIN, trained: float | None = 1.0) -> list[Rung]:
    base = _figures(0.0, perplexity=12.0).model_copy(update={"log_perplexity_ratio": gain})
    return [
        Rung(name=BASE, kind=BASE, figures=base),
        Rung(name=TRAINED, kind=TRAINED, figures=_figures(trained, kld=1e-5, perplexity=7.32)),
        *more,
        file,
    ]


def _file(merge_base: str = "original", **figures: Any) -> Rung:
    return Rung(
        name="x-q8_0.gguf", file="x-q8_0.gguf", figures=_figures(**figures), merge_base=merge_base, is_quantized=True
    )


def _said(file: Rung, *more: Rung, four_bits: bool = True, **options: Any) -> str:
    return " / ".join(explain(file, _ladder(file, *more, **options), trained_in_4_bits=four_bits))


NF4 = Rung(
    name="merged nf4", kind=MERGED, merge_base="nf4", figures=_figures(same_top=0.997, kld=2e-4, perplexity=7.33)
)
ORIGINAL = Rung(name="merged original", kind=MERGED, merge_base="original", figures=_figures(kld=0.3))


def test_the_figures_of_a_real_run_are_explained_in_one_sentence() -> None:
    """SmolLM2 in q8_0 on the original base, as it was measured."""
    assert _said(_file(recovery=1.70, same_top=0.78, perplexity=6.54)) == (
        "training saw the base in 4 bits and this file holds the original one, so it predicts these rows better than "
        "the trained model (perplexity 6.54 against 7.32, recovery 1.70) and has another most likely token at 22.0% of "
        "the positions; that is another model rather than a loss of quantization, and --merge-base nf4 follows the "
        "trained model, --merge-base auto measures both (edgetune reference RUN --merged nf4 shows by how much)"
    )


def test_a_measured_merge_base_is_named_with_its_figures() -> None:
    file = _file(recovery=1.70, same_top=0.78)
    measured = "(measured as merged nf4: mean KLD 0.0002, same top 99.7%, perplexity 7.33)"
    assert measured.replace("0.0002", "0.00020") in _said(file, NF4).replace("0.000200", "0.00020")
    other = NF4.model_copy(update={"name": "y-q8_0.gguf", "file": "y-q8_0.gguf", "kind": "file", "size": 9})
    assert "measured as y-q8_0.gguf" in _said(file, other)


@pytest.mark.parametrize(
    ("recovery", "same_top", "said"),
    [
        (1.05, 0.95, ""),
        (1.051, 0.95, "predicts these rows better"),
        (1.05, 0.949, "has another most likely token at 5.1% of the positions"),
        (0.8, 0.949, "has another most likely token"),
        (0.0, 0.95, ""),
    ],
)
def test_the_borders_of_a_file_on_the_original_base(recovery: float, same_top: float, said: str) -> None:
    found = _said(_file(recovery=recovery, same_top=same_top))
    assert (said in found) if said else not found
    assert ("better than" in found) == (recovery > 1.05)


def test_a_file_on_the_base_of_training_is_not_said_to_hold_another() -> None:
    assert _said(_file("nf4", recovery=1.0, same_top=0.7)) == ""
    assert _said(_file("original", recovery=1.0, same_top=0.7), four_bits=False) == ""


@pytest.mark.parametrize(("merge_base", "four_bits"), [("nf4", True), ("original", False)])
@pytest.mark.parametrize(("recovery", "told"), [(1.05, False), (1.06, True)])
def test_a_recovery_above_one_without_another_base(
    merge_base: str, four_bits: bool, recovery: float, told: bool
) -> None:
    found = _said(_file(merge_base, recovery=recovery), four_bits=four_bits)
    assert (
        f"a recovery of {recovery:.2f} means that the errors of quantization happen to favor these rows" in found
    ) == told


@pytest.mark.parametrize(("recovery", "told"), [(0.0, False), (-0.01, True)])
def test_a_file_that_is_worse_than_the_base(recovery: float, told: bool) -> None:
    file = _file("nf4", recovery=recovery).model_copy(update={"lost": StageLoss(stage="quantize", kld=1.0)})
    found = _said(file)
    assert (
        "worse than the base before training (recovery -0.01) (most is lost in the stage quantize)" in found
    ) == told


def test_a_training_without_gain() -> None:
    found = _said(_file(recovery=None), trained=None)
    assert found.startswith("training gained nothing on these rows (cross-entropy 2.00 before, 2.00 after it)")


@pytest.mark.parametrize(("error", "told"), [(0.25, False), (0.26, True)])
def test_a_gain_within_its_error(error: float, told: bool) -> None:
    found = _said(_file(recovery=0.5), gain=Mean(value=0.5, error=error))
    assert ("within 2 standard errors: a recovery of 0.50 says little" in found) == told


@pytest.mark.parametrize(("kld", "told"), [(0.6, True), (0.61, False)])
def test_a_divergence_that_is_mostly_that_of_the_merge_base(kld: float, told: bool) -> None:
    found = _said(_file(kld=kld), ORIGINAL)
    assert ("of its mean KLD of 0.600, 0.300 come from the merge base and not from the storage type" in found) == told
    assert not _said(_file("nf4", kld=0.4), ORIGINAL)


def test_every_sentence_is_one_and_the_table_says_it_once_for_all_files() -> None:
    from rich.console import Console

    one = _file(recovery=1.7, same_top=0.78)
    other = one.model_copy(update={"name": "y-q8_0.gguf", "file": "y-q8_0.gguf"})
    rungs = _ladder(one, other)
    for rung in (one, other):
        rung.meaning = explain(rung, rungs, trained_in_4_bits=True)
        assert [sentence.count(". ") for sentence in rung.meaning] == [0]
    console = Console(width=2000, record=True, file=io.StringIO())
    console.print(format_table(ValidationResults(rungs=rungs)))
    text = console.export_text()
    assert text.count("training saw the base in 4 bits") == 1
    assert "y-q8_0, x-q8_0: training saw" in text
