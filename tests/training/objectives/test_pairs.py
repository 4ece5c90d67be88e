"""Objectives of pairs and labels: the loss of the formula on the very ids and masks that we encoded."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgetune.data.objective_rows import EncodedAnswer
from edgetune.planning.prepare import PreparedRun
from edgetune.training.loading import load_model
from tests.training.objectives import encoded

BETA = 0.3


def _log_prob(model: Any, answer: EncodedAnswer) -> tuple[float, int]:
    """The log-probability of an answer under a model, and the number of its scored tokens."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([answer.row.input_ids])).logits[0].double()
    chosen = torch.log_softmax(logits, -1)
    scored = answer.row.scored
    return sum(float(chosen[position - 1, answer.row.input_ids[position]]) for position in scored), len(scored)


def _log_sigmoid(value: float) -> float:
    return -math.log1p(math.exp(-value))


def _shake(model: Any) -> None:
    """Give the new adapter a change, so that the model differs from its base."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("lora_B" in name or "norm" in name):
            parameter.data += torch.randn_like(parameter) * 0.05


def _made(base: Path, folder: Path, objective: dict[str, Any], **adapter: Any) -> tuple[Any, PreparedRun, Any]:
    """A trainer with a changed adapter, its prepared run and a separate copy of the base."""
    values = encoded.settings(base, folder, objective)
    prepared = encoded.prepare({**values, "adapter": adapter} if adapter else values)
    trainer = encoded.trainer_of(prepared, folder / "checkpoints")
    _shake(trainer.model)
    trainer.model.eval()
    return trainer, prepared, load_model(prepared.base, prepared.config).eval()


Figures = list[tuple[tuple[float, int], tuple[float, int], tuple[float, int], tuple[float, int]]]
"""Of each pair: (log-probability, tokens) of the chosen and rejected answer of the model, then of the base."""


def _dpo(figures: Figures) -> float:
    margins = [(chosen - base_chosen) - (rejected - base_rejected)
               for (chosen, _), (rejected, _), (base_chosen, _), (base_rejected, _) in figures]  # fmt: skip
    return sum(-_log_sigmoid(BETA * margin) for margin in margins) / len(margins)


def _ipo(figures: Figures) -> float:
    margins = [(chosen - base_chosen) / n - (rejected - base_rejected) / m
               for (chosen, n), (rejected, m), (base_chosen, _), (base_rejected, _) in figures]  # fmt: skip
    return sum((margin - 1 / (2 * BETA)) ** 2 for margin in margins) / len(margins)


def _hinge(figures: Figures) -> float:
    margins = [(chosen - base_chosen) - (rejected - base_rejected)
               for (chosen, _), (rejected, _), (base_chosen, _), (base_rejected, _) in figures]  # fmt: skip
    return sum(max(0.0, 1 - BETA * margin) for margin in margins) / len(margins)


def _cpo(figures: Figures) -> float:
    losses = [-_log_sigmoid(BETA * (chosen - rejected)) for (chosen, _), (rejected, _), *_ in figures]
    nll = -sum(chosen for (chosen, _), *_ in figures) / sum(n for (_, n), *_ in figures)
    return sum(losses) / len(losses) + nll


def _simpo(figures: Figures) -> float:
    losses = [-_log_sigmoid(BETA * (chosen / n - rejected / m) - 0.5) for (chosen, n), (rejected, m), *_ in figures]
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    ("objective", "formula"),
    [
        ({"kind": "dpo", "beta": BETA}, _dpo),
        ({"kind": "dpo", "beta": BETA, "loss_type": "hinge"}, _hinge),
        ({"kind": "ipo", "beta": BETA}, _ipo),
        ({"kind": "cpo", "beta": BETA}, _cpo),
        ({"kind": "simpo", "beta": BETA, "gamma": 0.5}, _simpo),
    ],
    ids=["dpo", "hinge", "ipo", "cpo", "simpo"],
)
def test_the_loss_is_that_of_the_formula_with_a_separate_copy_of_the_base(
    objective: dict[str, Any], formula: Callable[[Figures], float], base: Path, tmp_path: Path
) -> None:
    _check_loss(_made(base, tmp_path, objective), formula)


def test_the_reference_of_a_method_without_peft_is_the_base_too(base: Path, tmp_path: Path) -> None:
    _check_loss(_made(base, tmp_path, {"kind": "dpo", "beta": BETA}, kind="layernorm"), _dpo)


def _check_loss(made: tuple[Any, PreparedRun, Any], formula: Callable[[Figures], float]) -> None:
    trainer, prepared, reference = made
    pairs = prepared.validation.pairs[:4]
    figures = [
        tuple(_log_prob(model, side) for model in (trainer.model, reference) for side in (pair.chosen, pair.rejected))
        for pair in pairs
    ]
    batch = trainer.data_collator([trainer.eval_dataset[number] for number in range(len(pairs))])
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
    assert float(loss) == pytest.approx(formula(figures), rel=2e-5)  # type: ignore[arg-type]


def test_orpo_adds_the_odds_ratio_to_the_cross_entropy_of_the_whole_chosen_row(base: Path, tmp_path: Path) -> None:
    trainer, prepared, _ = _made(base, tmp_path, {"kind": "orpo", "beta": BETA})
    pairs = prepared.validation.pairs[:4]
    nll, tokens, ratios = 0.0, 0, []
    for pair in pairs:
        whole = EncodedAnswer(type(pair.chosen.row)(pair.chosen.row.input_ids,
                              [False] + [True] * (len(pair.chosen.row.input_ids) - 1)), 1)  # fmt: skip
        total, count = _log_prob(trainer.model, whole)
        nll, tokens = nll - total, tokens + count
        odds = []
        for side in (pair.chosen, pair.rejected):
            total, count = _log_prob(trainer.model, side)
            odds.append(total / count - math.log1p(-math.exp(total / count)))
        ratios.append(_log_sigmoid(odds[0] - odds[1]))
    batch = trainer.data_collator([trainer.eval_dataset[number] for number in range(len(pairs))])
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
    assert float(loss) == pytest.approx(nll / tokens - BETA * sum(ratios) / len(ratios), rel=2e-5)


def test_kto_weighs_answers_by_their_label_and_the_divergence_of_the_batch(base: Path, tmp_path: Path) -> None:
    objective = {"kind": "kto", "beta": BETA, "desirable_weight": 1.5}
    trainer, prepared, reference = _made(base, tmp_path, objective)
    rows = prepared.validation.labelled[:4]

    def log_ratio(answer: EncodedAnswer) -> float:
        return _log_prob(trainer.model, answer)[0] - _log_prob(reference, answer)[0]

    others = [rows[-1], *rows[:-1]]
    divergence = 0.0
    for row, other in zip(rows, others, strict=True):
        ids = [*row.prompt_ids, *other.completion_ids]
        mask = [*[False] * len(row.prompt_ids), *other.answer.answer_mask]
        divergence += log_ratio(EncodedAnswer(type(row.answer.row)(ids, mask), len(row.prompt_ids))) / len(rows)
    divergence = max(0.0, divergence)
    losses = []
    for row in rows:
        sign, weight = (1, 1.5) if row.label else (-1, 1.0)
        losses.append(weight * (1 - math.exp(_log_sigmoid(sign * BETA * (log_ratio(row.answer) - divergence)))))
    batch = trainer.data_collator([trainer.eval_dataset[number] for number in range(len(rows))])
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
    assert {row.label for row in rows} == {True, False}
    assert float(loss) == pytest.approx(sum(losses) / len(losses), rel=2e-5)


def test_the_reference_of_dpo_is_the_base_without_a_second_adapter(base: Path, tmp_path: Path) -> None:
    trainer, *_ = _made(base, tmp_path, {"kind": "dpo"})
    assert trainer.precompute_ref_logps  # by BaseAsReference, for each batch
    assert list(trainer.model.peft_config) == ["default"]
    assert trainer.ref_model is None
    assert "add_adapter" not in vars(trainer.model)


def _mean_log_ratio(made: tuple[Any, PreparedRun, Any]) -> tuple[float, dict[str, Any]]:
    """The mean log-probability of both answers of some pairs less that of the base, and their batch."""
    trainer, prepared, reference = made
    pairs = prepared.validation.pairs[:4]
    ratios = [
        _log_prob(trainer.model, side)[0] - _log_prob(reference, side)[0]
        for pair in pairs
        for side in (pair.chosen, pair.rejected)
    ]
    return sum(ratios) / len(ratios), trainer.data_collator([trainer.eval_dataset[n] for n in range(len(pairs))])


@pytest.mark.parametrize("kind", ["dpo", "ipo"])
@pytest.mark.parametrize("adapter", [{}, {"kind": "layernorm"}], ids=["lora", "layernorm"])
def test_the_divergence_from_the_base_is_logged_with_a_reference(
    kind: str, adapter: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    made = _made(base, tmp_path, {"kind": kind, "beta": BETA}, **adapter)
    expected, batch = _mean_log_ratio(made)
    with torch.no_grad():
        made[0].compute_loss(made[0].model, batch)
    logged = made[0]._metrics["eval"]
    assert abs(expected) > 1e-2
    assert logged["kl"][-1] == pytest.approx(expected, rel=1e-4)
    # TRL's own rewards are beta times the same differences
    assert logged["kl"][-1] == pytest.approx(
        (logged["rewards/chosen"][-1] + logged["rewards/rejected"][-1]) / (2 * BETA), rel=1e-4
    )


@pytest.mark.parametrize(
    "objective",
    [{"kind": "orpo"}, {"kind": "cpo"}, {"kind": "cpo", "loss_type": "ipo"}, {"kind": "simpo"}],
    ids=["orpo", "cpo", "cpo-ipo", "simpo"],
)
def test_the_divergence_from_the_base_is_measured_in_evaluations_without_a_reference(
    objective: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    made = _made(base, tmp_path, objective)
    expected, batch = _mean_log_ratio(made)
    made[0].prediction_step(made[0].model, batch, True)
    assert made[0]._stored_metrics["eval"]["eval_kl"] == [pytest.approx(expected, rel=1e-4)]
    made[0].compute_loss(made[0].model, batch)
    assert "kl" not in made[0]._stored_metrics["train"]


def test_a_start_that_was_taken_out_of_the_base_leaves_no_base_to_compare_with(base: Path, tmp_path: Path) -> None:
    trainer, *_ = _made(base, tmp_path, {"kind": "orpo"}, init="pissa")
    batch = trainer.data_collator([trainer.eval_dataset[0]])
    trainer.prediction_step(trainer.model, batch, True)
    assert "eval_kl" not in trainer._stored_metrics["eval"]
