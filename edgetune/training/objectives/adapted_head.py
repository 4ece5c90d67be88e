"""Trainers of TRL on a model whose output matrix is adapted.

TRL computes log-probabilities in blocks from `lm_head.weight`, which PEFT leaves as it was, and refuses such a model.
Here the logits are those of the model's own forward, with the adapter in it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch

_KEPT = "logits_to_keep"


def build_with_adapted_head(build: Callable[[], Any], model: Any) -> Any:
    """Build a trainer on a model whose output matrix is adapted.

    Args:
        build: Builds the trainer.
        model: Its model, a PeftModel.
    """
    base = model.get_base_model()
    forward = base.forward
    model.get_output_embeddings = lambda: None  # TRL looks there for an adapter
    try:
        trainer = build()
    finally:
        del model.get_output_embeddings
    if base.forward != forward:  # TRL has added its head
        base.forward = MethodType(_scoring_forward(forward, float(getattr(trainer, "temperature", 1.0))), base)
    return trainer


def _scoring_forward(forward: Callable[..., Any], temperature: float) -> Callable[..., Any]:
    """Return a forward that gives TRL the log-probabilities of the labels, from all logits of the scored positions."""
    from trl.trainer.utils import FusedCausalLMOutput

    keeps_positions = _KEPT in inspect.signature(forward).parameters

    def scoring_forward(
        self: Any, *args: Any, fused_lm_head: bool = False, labels: torch.Tensor | None = None,
        num_items_in_batch: Any = None, **keywords: Any,
    ) -> Any:  # fmt: skip
        if not fused_lm_head or labels is None:
            given = {"labels": labels, "num_items_in_batch": num_items_in_batch}
            return forward(*args, **keywords, **{name: value for name, value in given.items() if value is not None})
        targets = labels[:, 1:]
        mask = targets != -100
        positions = mask.any(0).nonzero().flatten()
        if not len(positions):  # nothing is scored; transformers keeps all positions where none are named
            positions = positions.new_zeros(1)
        kept = {_KEPT: positions} if keeps_positions else {}
        outputs = forward(*args, **keywords | {"use_cache": False} | kept)
        logits = outputs.logits if keeps_positions else outputs.logits[:, positions]
        scored = logits[mask[:, positions]].float() / temperature
        fields = {
            name: found.new_zeros(mask.shape).masked_scatter(mask, found)
            for name, found in _fields(scored, targets[mask]).items()
        }
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss, aux_loss = -fields["log_probs"].sum() / count, getattr(outputs, "aux_loss", None)
        if aux_loss is not None:
            loss = loss + getattr(self.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux_loss
        return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **fields)

    return scoring_forward


def _fields(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what TRL reads of each scored position, for logits f32 [n, vocabulary] and targets [n]."""
    logs = torch.log_softmax(logits, -1)
    log_probs = logs.gather(-1, targets[:, None])[:, 0]
    with torch.no_grad():
        return {
            "log_probs": log_probs,
            "entropy": -(logs.exp() * logs).sum(-1),
            "log_sum_sq_probs": torch.logsumexp(2 * logs, -1),
            "mean_logits": logits.mean(-1),
            "is_top1": logits.argmax(-1) == targets,
        }
