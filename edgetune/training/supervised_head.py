"""Log-probabilities of the supervised tokens on a CPU, from products of the output matrix with their positions alone.

TRL's function projects every position where there is no Triton, and projects again in the backward pass. This one takes
the positions whose token is supervised, and computes the gradient of the hidden states together with the loss: two
products in place of three. A block of logits is in memory at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import trl.trainer.utils as trl_utils

from edgetune.planning.memory import LOGIT_BLOCK

_TRL = trl_utils._ChunkedLogProbFunction
_USES_TRITON = trl_utils._use_triton


def install() -> None:
    """Let the trainers of TRL compute log-probabilities on a CPU by this module."""
    trl_utils._use_triton = _takes_supervised_alone
    trl_utils._ChunkedLogProbFunction = SupervisedLogProbs


def _takes_supervised_alone(device: torch.device) -> bool:
    return device.type == "cpu" or bool(_USES_TRITON(device))


class SupervisedLogProbs:
    """Stands in for TRL's `ChunkedLogProbFunction`, with the same arguments and results."""

    @staticmethod
    def apply(
        hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor,
        temperature: float, chunk_size: int, softcap: float | None, scale: float, outputs: tuple[str, ...],
    ) -> Any:  # fmt: skip
        """Return log-probabilities and the figures named in `outputs`, each [n], for hidden states [n, width]."""
        figures = tuple(name for name in outputs if name != "log_probs")
        is_trained = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
        if hidden.device.type != "cpu" or is_trained or set(figures) - set(_FIGURES):
            arguments = (hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs)
            return _TRL.apply(*arguments)
        found = _log_probs(hidden, weight, bias, targets, 1 / temperature, softcap, scale, figures)
        named = dict(zip(figures, found[1:], strict=True))
        if "is_top1" in named:
            named["is_top1"] = named["is_top1"].bool()
        return (found[0], *map(named.get, _FIGURES))


_FIGURES = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""In the order in which TRL's function returns them."""


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor,
        inverse: float, softcap: float | None, scale: float, outputs: tuple[str, ...],
    ) -> Any:  # fmt: skip
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden, dtype=torch.float32) if needs_gradient else None
        found = [hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(1 + len(outputs))]
        matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        rows = max(1, LOGIT_BLOCK // (4 * len(weight)))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = torch.nn.functional.linear(hidden[part].to(dtype), matrix, offset).float()
            block = _Block(logits, targets[part], inverse, softcap, scale)
            for name, values in zip(("log_probs", *outputs), found, strict=True):
                values[part] = getattr(block, name)()
            if gradient is not None:
                gradient[part] = torch.mm(block.gradient().to(dtype), matrix)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*found[1:])
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, log_probs: torch.Tensor | None, *_: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        found = None if log_probs is None else (gradient * log_probs[:, None]).to(ctx.dtype)
        return found, None, None, None, None, None, None, None


_log_probs: Any = _LogProbs.apply


class _Block:
    """Logits of some positions: what the loss and the figures read of them. Each is computed at most once."""

    def __init__(
        self, logits: torch.Tensor, targets: torch.Tensor, inverse: float, softcap: float | None, scale: float
    ) -> None:
        self._slope: torch.Tensor | None = None
        self._factor = inverse * scale
        if scale != 1:
            logits *= scale
        if softcap is not None:
            logits = torch.tanh(logits / softcap)
            self._slope = 1 - logits * logits
            logits = logits * softcap
        if inverse != 1:
            logits *= inverse
        self._logits, self._targets = logits, targets[:, None]
        self._largest, self._top = logits.max(-1, keepdim=True)
        self._chosen = logits.gather(-1, self._targets)
        self._exponents = (logits - self._largest).exp_()
        self._sum = self._exponents.sum(-1, keepdim=True)

    def log_probs(self) -> torch.Tensor:
        return (self._chosen - self._largest - self._sum.log())[:, 0]

    def entropy(self) -> torch.Tensor:
        mean = _dot(self._exponents, self._logits) / self._sum[:, 0]
        return (self._largest + self._sum.log())[:, 0] - mean

    def log_sum_sq_probs(self) -> torch.Tensor:
        return _dot(self._exponents, self._exponents).log() - 2 * self._sum[:, 0].log()

    def mean_logits(self) -> torch.Tensor:
        return self._logits.mean(-1)

    def is_top1(self) -> torch.Tensor:
        return (self._top == self._targets)[:, 0].float()

    def gradient(self) -> torch.Tensor:
        """Return the derivatives of the log-probabilities by the products, in place of the exponents."""
        found = self._exponents.div_(-self._sum)
        found.scatter_add_(-1, self._targets, torch.ones_like(self._sum))
        if self._slope is not None:
            found *= self._slope
        return found.mul_(self._factor) if self._factor != 1 else found


def _dot(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the inner products [n] of rows [n, columns], without an array of that size."""
    return torch.bmm(one[:, None], other[:, :, None])[:, 0, 0]
