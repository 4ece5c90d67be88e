"""What the functions of `edgetune_native` return."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["AmxProbe", "Comparison", "Cpu", "GgmlLibrary", "GgmlType", "LogProbCodes"]


class Comparison(NamedTuple):
    """Two models' logits compared, one entry a row; every number in nats and f64."""

    kld: NDArray[np.float64]
    """[n] KL(reference || other), never negative; +inf where the other gives no mass to what the reference allows."""
    same_top: NDArray[np.bool_]
    """[n] whether both have the same arg-max; of equal logits the lowest index counts, as in `numpy.argmax`."""
    nll_reference: NDArray[np.float64]
    """[n] -log p_reference(target)."""
    nll: NDArray[np.float64]
    """[n] -log p_other(target)."""


class LogProbCodes(NamedTuple):
    """Rows of log-probabilities in 16 bits: log p(i) is about `scale * codes[i] + min_log_prob`."""

    scale: NDArray[np.float32]
    """[n] nats per step; 0 for a row whose logits are all equal."""
    min_log_prob: NDArray[np.float32]
    """[n] what code 0 stands for: the smallest log-probability, but at most 16 nats below the largest."""
    codes: NDArray[np.uint16]
    """[n, v]."""


class Cpu(NamedTuple):
    """The instruction set in use and why."""

    isa: str
    """`scalar`, `avx2`, `avx512` or `neon`; `numpy` for the twin."""
    reason: str
    features: tuple[str, ...]
    """What the CPU and the operating system offer, of what could matter to kernels."""


class AmxProbe(NamedTuple):
    """Whether AMX works, as tried in a child process."""

    advertised: bool
    """The CPU reports AMX and the operating system saves its registers."""
    usable: bool
    """A tile product really ran."""
    reason: str


class GgmlType(NamedTuple):
    """One storage type of GGUF."""

    name: str
    """Lower case: `q4_k`."""
    id: int
    """As it stands in a GGUF file (`enum ggml_type`)."""
    block_size: int
    """Weights per block."""
    block_bytes: int
    """Bytes per block."""
    requires_weights: bool
    """Whether it cannot be quantized to without importance weights."""


class GgmlLibrary(NamedTuple):
    """The libggml that quantizes."""

    path: str
    version: str
