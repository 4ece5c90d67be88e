"""What the quantization of single tensors costs: the results of `edgetune validate --locate`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorCost:
    """What the quantization of some tensors costs, measured by storing them in 16 bits."""

    tensor: str
    """Their name; `*` stands for every layer."""
    type: str
    """Their storage type in the file."""
    weights: int
    kld_without: float
    """Mean KL divergence of the file with them in 16 bits, in nats."""
    gain: float
    """How much smaller that divergence is."""


@dataclass(frozen=True)
class TensorCosts:
    """The costs of the kinds of tensors, and of the layers of the costliest kind; the costliest first."""

    kld: float
    """Mean KL divergence of the file as it is, on the same tokens, in nats."""
    kinds: tuple[TensorCost, ...]
    layers: tuple[TensorCost, ...]
    complete: bool
    """Whether there was time for all of them."""
