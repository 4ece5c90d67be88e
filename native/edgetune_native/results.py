"""The result types of `edgetune_native`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "AmxProbe",
    "Comparison",
    "Cpu",
    "FourBit",
    "GgmlLibrary",
    "GgmlType",
    "LogProbCodes",
    "NBits",
    "NestedAbsmax",
]


class Comparison(NamedTuple):
    """A comparison of two models' logits, one entry per row; all numbers are float64, divergences in nats."""

    kld: NDArray[np.float64]
    """[n] KL(reference || other), never negative; +inf where the other has probability 0 and the reference has not."""
    same_top: NDArray[np.bool_]
    """[n] whether both have the same arg-max; the lowest index of equal logits, as in `numpy.argmax`."""
    nll_reference: NDArray[np.float64]
    """[n] -log p_reference(target)."""
    nll: NDArray[np.float64]
    """[n] -log p_other(target)."""
    reverse_kld: NDArray[np.float64]
    """[n] KL(other || reference), never negative; +inf where the reference has probability 0 and the other has not."""
    entropy_reference: NDArray[np.float64]
    """[n] -sum p_reference log p_reference."""
    entropy: NDArray[np.float64]
    """[n] -sum p_other log p_other."""
    top_k_overlap: NDArray[np.float64]
    """[n] share of the reference's k largest logits that are also among the k largest of the other, 0 to 1. Of equal
    logits, the one with the lower index counts as larger, as in a stable sort."""


class LogProbCodes(NamedTuple):
    """Rows of log-probabilities in 16 bits: log p(i) is about `scale * codes[i] + min_log_prob`."""

    scale: NDArray[np.float32]
    """[n] nats per step; 0 for a row whose logits are all equal."""
    min_log_prob: NDArray[np.float32]
    """[n] the value of code 0: the smallest log-probability, but at most 16 nats below the largest."""
    codes: NDArray[np.uint16]
    """[n, v]."""


class NBits(NamedTuple):
    """Rows of weights in blocks of 4- or 8-bit codes, for com.microsoft.MatMulNBits: scale * (q - zero point).

    k_blocks = ceil(k / block_size).
    """

    codes: NDArray[np.uint8]
    """[n, k_blocks, block_size * bits // 8]; of two 4-bit codes the first is in the low half of the byte."""
    scales: NDArray[np.float32] | NDArray[np.float16]
    """[n, k_blocks]; may be negative in symmetric blocks."""
    zero_points: NDArray[np.uint8] | None
    """[n, ceil(k_blocks * bits / 8)], packed as the codes; None means 8 (4 bits) or 128 (8 bits)."""


class Cpu(NamedTuple):
    """The instruction set in use and the reason for it."""

    isa: str
    """`scalar`, `avx2`, `avx512` or `neon`; `numpy` for the NumPy reference backend."""
    reason: str
    features: tuple[str, ...]
    """Features of the CPU that the operating system enables and that matter to kernels."""


class AmxProbe(NamedTuple):
    """Whether AMX works, tried in a child process."""

    advertised: bool
    """The CPU reports AMX and the operating system saves its registers."""
    usable: bool
    """A tile product ran and was right."""
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
    """Whether quantization to it needs importance weights."""


class GgmlLibrary(NamedTuple):
    """The libggml in use."""

    path: str
    version: str


class NestedAbsmax(NamedTuple):
    """The 8-bit encoding of the absmax of 4-bit blocks: absmax = quant_map[code] * nested absmax + offset.

    The fields are those of a saved checkpoint: `nested_absmax` and `nested_quant_map` are tensors next to the weight,
    `nested_offset` and `nested_blocksize` are in the JSON of its `quant_state.bitsandbytes__nf4`.
    """

    absmax: NDArray[np.float32]
    """[ceil(blocks / blocksize)] `nested_absmax`."""
    quant_map: NDArray[np.float32]
    """[256] `nested_quant_map`."""
    offset: float
    """`nested_offset`: the mean of the absmax; a float32 value."""
    blocksize: int = 256
    """`nested_blocksize`: absmax per nested block."""


class FourBit(NamedTuple):
    """A tensor in bitsandbytes' 4-bit blocks: its packed codes and its quant_state."""

    packed: NDArray[np.uint8]
    """[ceil(elements / 2)]; the code of the even element is in the high half of a byte."""
    absmax: NDArray[np.uint8] | NDArray[np.float32]
    """[blocks] the scales: float32, or with `nested` their 8-bit codes."""
    nested: NestedAbsmax | None
    quant_map: NDArray[np.float32]
    """[16] the values of the codes."""
    shape: tuple[int, ...]
    quant_type: str
    """`nf4` or `fp4`."""
    blocksize: int
    """Elements per block."""
    dtype: str
    """The dtype of the tensor, before and after: `f32`, `f16` or `bf16`."""
