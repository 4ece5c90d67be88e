"""Log-probabilities of supervised tokens alone, and their gradients, beside those of all logits in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.utils as trl_utils

from edgetune.training import supervised_head
from edgetune.training.supervised_head import SupervisedLogProbs
from tests.training.objectives import encoded

FIGURES = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
COUNT, WIDTH, VOCABULARY = 50, 16, 300


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(COUNT, WIDTH), torch.randn(VOCABULARY, WIDTH), torch.randn(VOCABULARY)
    targets = torch.randint(0, VOCABULARY, (COUNT,))
    targets[::3] = (hidden @ weight.T + bias).argmax(-1)[::3]
    return hidden, weight, bias, targets


def in_float64(softcap: float | None, scale: float, temperature: float) -> dict[str, torch.Tensor]:
    hidden, weight, bias, targets = inputs()
    given = hidden.double().requires_grad_()
    logits = (given @ weight.double().T + bias.double()) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logs = torch.log_softmax(logits / temperature, -1)
    chosen = logs.gather(-1, targets[:, None])[:, 0]
    (gradient,) = torch.autograd.grad((chosen * torch.arange(COUNT)).sum(), given)
    return {
        "log_probs": chosen.detach(), "gradient": gradient, "entropy": -(logs.exp() * logs).sum(-1).detach(),
        "log_sum_sq_probs": torch.logsumexp(2 * logs, -1).detach(),
        "mean_logits": (logits / temperature).mean(-1).detach(), "is_top1": logs.argmax(-1) == targets,
    }  # fmt: skip


@pytest.mark.parametrize("block", [1, 7 * 4 * VOCABULARY, 2**25])
@pytest.mark.parametrize(("softcap", "scale", "temperature"), [(None, 1.0, 1.0), (None, 0.5, 0.7), (5.0, 1.5, 2.0)])
def test_figures_and_gradients_are_those_of_all_logits(
    softcap: float | None, scale: float, temperature: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervised_head, "LOGIT_BLOCK", block)
    hidden, weight, bias, targets = inputs()
    given = hidden.requires_grad_()
    names = ("log_probs", *FIGURES)
    found = SupervisedLogProbs.apply(given, weight, bias, targets, temperature, 32768, softcap, scale, names)
    (gradient,) = torch.autograd.grad((found[0] * torch.arange(COUNT)).sum(), given)
    expected = in_float64(softcap, scale, temperature)
    for name, value in zip(names, found, strict=True):
        if name == "is_top1":
            assert value.dtype is torch.bool
            assert torch.equal(value, expected[name])
            assert 0 < int(value.sum()) < COUNT
        else:
            # differences of sums that are as large as the largest logit
            rounding = 16 * torch.finfo(torch.float32).eps * float((hidden.detach() @ weight.T).abs().max())
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=rounding)
    torch.testing.assert_close(gradient.double(), expected["gradient"], rtol=1e-4, atol=1e-4)


def test_figures_that_are_not_named_are_not_computed() -> None:
    hidden, weight, bias, targets = inputs()
    found = SupervisedLogProbs.apply(hidden, weight, bias, targets, 1.0, 32768, None, 1.0, ("log_probs", "is_top1"))
    assert [value is None for value in found] == [False, True, True, True, False]


def test_a_trained_output_matrix_gets_its_gradient_from_trl() -> None:
    hidden, weight, bias, targets = inputs()
    weight.requires_grad_()
    arguments = (hidden, weight, bias, targets, 1.0, 32768, None, 1.0, ("log_probs",))
    (found,) = torch.autograd.grad(SupervisedLogProbs.apply(*arguments)[0].sum(), weight)
    (expected,) = torch.autograd.grad(supervised_head._TRL.apply(*arguments)[0].sum(), weight)
    assert torch.equal(found, expected)
    assert bool(found.any())


def test_no_supervised_token_gives_a_loss_of_zero_that_can_be_differentiated() -> None:
    hidden, weight, _, targets = inputs()
    given = hidden.requires_grad_()
    found = SupervisedLogProbs.apply(given[:0], weight, None, targets[:0], 1.0, 32768, None, 1.0, ("log_probs",))
    (gradient,) = torch.autograd.grad(found[0].sum(), given)
    assert not gradient.any()


def test_trainers_of_trl_project_supervised_positions_alone(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = encoded.prepare(encoded.settings(base, tmp_path, {"kind": "sft"}, max_steps=2, eval_steps=1000))
    trainer = encoded.trainer_of(prepared, tmp_path / "checkpoints")
    projected: list[int] = []
    apply = SupervisedLogProbs.apply

    def counted(hidden: torch.Tensor, *arguments: Any) -> Any:
        projected.append(len(hidden))
        return apply(hidden, *arguments)

    monkeypatch.setattr(SupervisedLogProbs, "apply", staticmethod(counted))
    collated = [trainer.data_collator([trainer.train_dataset[i] for i in range(4)])]
    loss = trainer.compute_loss(trainer.model, dict(collated[0]))
    supervised = int((collated[0]["labels"] != -100).sum())
    assert projected == [supervised]
    labels = collated[0].pop("labels")
    logits = trainer.model(**collated[0]).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_trl_has_the_names_that_are_replaced() -> None:
    supervised_head.install()
    names = trl_utils.add_fused_lm_head.__code__.co_consts
    inside = {name for code in names if hasattr(code, "co_names") for name in code.co_names}
    assert {"_use_triton", "_ChunkedLogProbFunction"} <= inside
    assert trl_utils._ChunkedLogProbFunction is SupervisedLogProbs
