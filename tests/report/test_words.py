"""What the report says, held against the figures it says it about."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.report import curves, findings, gate_table, survival, verdict
from edgetune.report.gather import FileReport, ReportData, short_names
from edgetune.runs.manifest import RunManifest
from edgetune.validation import numbers
from edgetune.validation.results import Miss, ScoreFigures, ValidationResults
from edgetune_converters.provenance.receipts import Receipt
from tests.report.factories import Content

SPACE = "\u00a0"


def measured(
    name: str, size: int, kld: float, *, gate: Content | None = None, misses: int = 0, unmeasured: Sequence[str] = ()
) -> FileReport:
    rung = {
        "name": name,
        "file": name,
        "size": size,
        "figures": {
            "kld": {"value": kld, "error": kld / 9},
            "recovery": 0.9,
            "same_top": {"value": 0.99, "error": 0.01},
        },
        "contract": {"conversations": 3, "differences": []},
    }
    missed = [
        {"rung": name, "figure": "mean_kld_max", "stage": "quantize", "sentence": "mean KLD is x", "hint": "Finer."}
    ]
    stored = {
        "version": 1,
        "gate": gate or {},
        "misses": missed * misses,
        "rungs": [rung],
        "reference": {"rows": 2, "tokens": 9},
        "unmeasured": [{"rung": name, "figure": key, "reason": "left out"} for key in unmeasured],
    }
    results = ValidationResults.model_validate(stored)
    return FileReport(name, name.removesuffix(".gguf"), results.rungs[0], results, None, False)


def material(*files: FileReport) -> ReportData:
    return ReportData("run", RunManifest(), [], [], list(files))


def test_the_verdict_says_that_a_sample_is_small() -> None:
    assert (
        "2 held-out rows with 9 scored tokens are a small sample" in verdict.judge(material(measured("a", 1, 1))).basis
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (math.nan, "–"), (True, "–"), ("x", "–"), (0, "0"), (0.0312345, "0.0312"), (1.2e-5, "1.2×10⁻⁵"),
        (13.5, "13.5"), (184.992, "185"), (12345.6, "12,346"), (2.5e7, "2.5×10⁷"), (-0.5, "-0.500"), (1, "1.00"),
    ],
)  # fmt: skip
def test_numbers_are_shortened_to_three_digits(value: object, text: str) -> None:
    assert numbers.short(value) == text


@given(st.floats(1e-12, 1e12))
def test_short_numbers_are_near(value: float) -> None:
    mantissa, _, exponent = numbers.short(value).replace(",", "").partition("×10")
    back = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
    assert float(mantissa) * 10 ** int(exponent.translate(back) or 0) == pytest.approx(value, rel=0.051)


@pytest.mark.parametrize(
    ("value", "text"), [(0.97333, "97.3 %"), (1.0, "100.0 %"), (0.99999, "> 99.9 %"), (1.02, "102.0 %"), (0, "0.0 %")]
)
def test_only_the_whole_is_a_hundred_per_cent(value: float, text: str) -> None:
    assert numbers.share(value) == text.replace(" ", SPACE)


@pytest.mark.parametrize(("value", "text"), [(5_850_816, "5.85 MB"), (4_370_000_000, "4.37 GB"), (999, "0.999 kB")])
def test_sizes_are_written_in_decimal_units(value: int, text: str) -> None:
    assert numbers.size(value) == text.replace(" ", SPACE)


@pytest.mark.parametrize(
    ("names", "shorts"),
    [
        (["smart-home-q8_0.gguf", "smart-home-q4_0.gguf"], ["q8_0", "q4_0"]),
        (["a.gguf", "b.gguf"], ["a", "b"]),
        (["only-q8_0.gguf"], ["only-q8_0"]),
        (["m-q4_k_m.gguf", "m-q4_k_m"], ["m-q4_k_m", "m-q4_k_m"]),
        (["m-int4", "m-q4_0.gguf", "m-x-y.gguf"], ["int4", "q4_0", "x-y"]),
        (["m.gguf", "m-q4_0.gguf"], ["m", "q4_0"]),
    ],
)
def test_names_are_shortened_to_where_they_differ(names: list[str], shorts: list[str]) -> None:
    assert list(short_names(names).values()) == shorts


def test_the_smallest_file_that_passes_is_chosen() -> None:
    limit = {"mean_kld_max": 0.05}
    files = [
        measured("big", 900, 0.001, gate=limit),
        measured("middle", 500, 0.02, gate=limit),
        measured("small", 100, 0.4, gate=limit, misses=1),
    ]
    judged = verdict.judge(material(*files))
    assert (judged.state, judged.word, judged.chosen) == ("mixed", "1 of 3 files fails the gate", 1)
    assert judged.headline.startswith("middle (")
    assert [miss.file for miss in judged.misses] == ["small"]


def test_when_nothing_passes_what_to_do_is_said() -> None:
    judged = verdict.judge(material(measured("one", 9, 0.5, misses=1), measured("two", 8, 0.6, misses=1)))
    assert (judged.state, judged.next_step) == ("failed", "Finer.")


def test_a_gate_that_was_not_measured_is_not_said_to_be_passed() -> None:
    judged = verdict.judge(material(measured("one", 9, 0.5, gate={"task_drop_max": 0.1}, unmeasured=["task_drop_max"])))
    assert (judged.state, judged.word) == ("incomplete", "Gate not fully measured")
    assert "some were not measured" in judged.headline
    assert judged.unmeasured == ["one: drop of the task score was not measured: left out."]
    file = measured("one", 9, 0.5, gate={"task_drop_max": 0.1}, unmeasured=["task_drop_max"])
    assert gate_table.cell(file, gate_table.columns([file])[2]) == gate_table.GateCell("none", "not measured")


def test_a_gate_without_thresholds_is_no_verdict() -> None:
    files = [measured("one", 9, 0.5), measured("two", 8, 0.6)]
    judged = verdict.judge(material(*files))
    assert (judged.state, judged.word) == ("unjudged", "No threshold is set")
    assert judged.headline == (
        f"two (0.00800{SPACE}kB) keeps 90.0{SPACE}% of the training gain, and has the trained model's top token at "
        f"99.0{SPACE}% of the tokens."
    )
    assert judged.next_step.startswith("Only contract and origin were checked.")
    assert findings.sizes(files).startswith("No threshold is set that could choose a file")
    judged = verdict.judge(material(measured("one", 9, 0.5), measured("two", 8, 0.6, gate={"mean_kld_max": 1.0})))
    assert (judged.state, judged.word) == ("mixed", "1 of 2 files has no threshold to meet")


def test_a_file_that_passes_a_generous_gate_is_not_said_to_match_the_trained_model() -> None:
    judged = verdict.judge(material(measured("one", 9, 0.5, gate={"recovery_min": 0.1})))
    assert (judged.state, judged.headline) == ("passed", "one meets every threshold.")
    judged = verdict.judge(material(measured("one", 9, 0.5, gate={"mean_kld_max": 0.1}, misses=1)))
    assert judged.headline == "one fails the gate."


SCORES = {
    "pairs": 20, "mean_difference": 0.02, "max_difference": 0.3, "correlation": 0.999, "accuracy": 0.85,
    "trained_accuracy": 0.9, "flips": 0.05, "trained_spread": 2.0,
}  # fmt: skip


def test_a_reward_model_is_described_by_its_scores() -> None:
    file = measured("one", 9, 0.5)
    file.rung.scores = ScoreFigures.model_validate(SCORES)
    judged = verdict.judge(material(file))
    assert judged.headline == (
        f"one ranks 85.0{SPACE}% of the pairs as labelled (90.0{SPACE}% as trained), and 5.0{SPACE}% in another order "
        "than the trained model."
    )
    assert [tile.title for tile in judged.tiles[:3]] == ["Pair accuracy", "Pairs in another order", "Score difference"]
    assert findings.scores(file) == (
        f"Of 20 held-out pairs, one ranks 85.0{SPACE}% as labelled, the trained model 90.0{SPACE}%; 1 pair has another "
        f"order. A score differs by 0.0200 on average, 1.0{SPACE}% of the spread of the trained scores."
    )


def test_how_far_from_the_limit() -> None:
    file = measured("one", 9, 0.5, gate={"mean_kld_max": 0.1}, misses=1)
    assert gate_table.misses(file)[0].distance == "5.00 times the limit"
    columns = gate_table.columns([file])
    assert [(column.title, column.limit) for column in columns][2:] == [("Mean KLD", "≤ 0.1")]
    assert gate_table.cell(file, columns[2]) == gate_table.GateCell("fail", "0.500")


def test_files_with_different_limits_say_theirs() -> None:
    files = [measured("one", 9, 0.5, gate={"mean_kld_max": 1.0}), measured("two", 9, 0.5, gate={"mean_kld_max": 2.0})]
    column = gate_table.columns(files)[2]
    assert column.limit == ""
    assert [gate_table.cell(file, column).text for file in files] == ["0.500 (≤ 1)", "0.500 (≤ 2)"]


def test_a_missed_threshold_that_the_report_does_not_know_is_shown() -> None:
    file = measured("one", 9, 0.5, gate={"novel_max": 0.1})
    file.validation.misses.append(Miss(rung="one", figure="novel_max", stage="x", sentence="novel is 3"))
    column = gate_table.columns([file])[2]
    assert gate_table.cell(file, column).state == "fail"


sizes = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=8)


@given(sizes)
def test_the_front_is_what_no_other_file_beats(points: list[tuple[int, int]]) -> None:
    files = [measured(str(index), size, float(kld)) for index, (size, kld) in enumerate(points)]
    for file, (size, kld) in zip(files, points, strict=True):
        beaten = any((a <= size and b <= kld) and (a, b) != (size, kld) for a, b in points)
        assert findings.is_on_front(file, files) is not beaten


def test_tensors_are_placed_by_layer_and_slot() -> None:
    receipt = Receipt(
        artifact="m.gguf", sha256="", size=1, format="gguf", recipe="q6_k", architecture="llama", base={}, adapter=None,
        merge_base="original", types={}, tensors={"token_embd.weight": "q6_k"}, weights=1, bits_per_weight=6.5,
        fallback_share=0.0, tokenizer={}, survival={"blk.3.attn_v.weight": 0.4, "token_embd.weight": 0.99},
    )  # fmt: skip
    found = survival.tensor_survival(receipt)
    assert [(each.layer, each.slot, each.type) for each in found] == [("3", "attn_v", ""), ("", "token_embd", "q6_k")]
    said = findings.survival(found)
    assert "1 of 2" in said
    assert "--tensor-type 'attn_v=q6_k'" in said
    assert "More than half" in said


@pytest.mark.parametrize(
    ("values", "word"),
    [([3, 2, 1], "still falling"), ([3, 1, 2], "rises after step 2"), ([3, 1, 1], "leveled off"), ([3], "too few")],
)
def test_what_the_held_out_loss_says(values: list[float], word: str) -> None:
    log = [{"step": step, "eval_loss": value} for step, value in enumerate(values, 1)]
    assert word in curves.curves(log).finding


def test_figures_of_the_objective_are_curves_with_their_meaning() -> None:
    log: list[dict[str, float]] = [
        {"step": 1, "loss": 0.7, "reward_margin": 0.1, "kl": -0.2},
        {"step": 2, "loss": 0.6, "reward_margin": 0.3, "kl": 0.4},
        {"step": 2, "eval_loss": 0.65, "eval_reward_margin": 0.25, "eval_kl": 0.3},
    ]
    found = curves.curves(log, "dpo")
    assert [figure.name for figure in found.figures] == ["reward margin", "KL"]
    margin, kl = found.figures
    assert (margin.training, margin.held_out) == ([(1, 0.1), (2, 0.3)], [(2, 0.25)])
    assert "estimates the KL divergence from the base" in kl.meaning
    assert found.held_out_rows == [(2, [0.65, 0.25, 0.3])]
    assert found.loss_unit == ""
    assert curves.curves(log, "sft").loss_unit == "nats per token"
    assert curves.curves(log, "sft").figures == curves.curves(log, "of another version").figures == []


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ([0.1, 0.9], "of answers to held-out prompts rose from 0.100 to 0.900"),
        ([0.5, 0.5], "of answers to held-out prompts stayed from 0.500 to 0.500"),
        ([0.4], "of answers to the prompts of training fell from 1.00 to 0.500"),
    ],
)
def test_what_the_reward_says_of_reinforcement_learning(rewards: list[float], said: str) -> None:
    log = [{"step": step, "eval_loss": 0.0, "eval_reward": value} for step, value in enumerate(rewards, 1)]
    log += [{"step": 1, "loss": 0.0, "reward": 1.0}, {"step": 2, "loss": 0.0, "reward": 0.5}]
    assert said in curves.curves(log, "grpo").finding


points = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=900).map(lambda values: list(enumerate(values)))


@given(points, st.integers(3, 50))
def test_thinned_curves_keep_their_ends_and_their_range(found: list[tuple[float, float]], most: int) -> None:
    thin = curves.thinned(found, most)
    assert len(thin) == min(len(found), most)
    assert (thin[0], thin[-1]) == (found[0], found[-1])
    values = [value for _, value in found]
    assert all(min(values) - 1e-3 <= value <= max(values) + 1e-3 for _, value in thin)
    steps = [step for step, _ in thin]
    assert steps == sorted(set(steps))
