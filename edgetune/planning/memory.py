"""Memory of a training at its peak, estimated before weights are loaded.

What is stored (weights, adapter, gradients, optimizer, teacher) is counted. What a forward and backward pass needs is
estimated from the shapes of the largest batch, with factors that were measured on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgetune.config import QuantizationConfig
from edgetune.methods.selective import SelectiveMethod
from edgetune.methods.virtual_tokens import VirtualTokenMethod
from edgetune.objectives import Objective
from edgetune.objectives.distillation import Distillation
from edgetune.objectives.online import Online
from edgetune.planning.card import format_bytes
from edgetune.planning.disk import linear_layers
from edgetune.planning.optimizers import OPTIMIZERS
from edgetune.planning.prepare import PreparedRun
from edgetune_converters.architectures import completed_config
from edgetune_converters.errors import CheckpointError
from edgetune_converters.reading.checkpoint import Checkpoint

LAYER_COPIES = 12
"""Arrays [tokens, hidden size] that the backward pass of a layer needs."""
FFN_COPIES = 4.5
"""Arrays [tokens, feed-forward size] that it needs."""
TAUGHT_COPIES = (2.0, 8.0)
"""Arrays [tokens, vocabulary] and [trained tokens, vocabulary] of a distillation from a local teacher."""
TILE = (4096, 32768)
"""Tokens and columns of the vocabulary of a tile of TRL's log-probabilities (trl.kernels.chunked_logprob)."""
TILE_TEMPORARIES = 7
"""Arrays of the size of a tile beside the tile itself, where the processor computes it: a GPU has a kernel for it."""
_ROUNDED = {4: 0.5, 8: 1.0}


@dataclass(frozen=True)
class Arithmetic:
    """How the device that trains stores and computes numbers."""

    stored: int
    """Bytes of a weight that is not quantized."""
    computed: int
    """Bytes of an activation."""
    is_gpu: bool = False


@dataclass(frozen=True)
class MemoryPart:
    """A part of the memory."""

    name: str
    bytes: float


@dataclass(frozen=True)
class MemoryEstimate:
    """The parts that are in memory at the peak of a training, without the libraries themselves."""

    parts: tuple[MemoryPart, ...]

    @property
    def total(self) -> float:
        """Sum of the parts in bytes."""
        return sum(part.bytes for part in self.parts)


def estimate_memory(
    prepared: PreparedRun, trained: int, device: Arithmetic, longest: int | None = None
) -> MemoryEstimate:
    """Estimate the memory of a training at its peak.

    Args:
        prepared: The training.
        trained: Number of trained parameters.
        device: How it stores and computes numbers.
        longest: Tokens of the longest row; None: that of the training rows.
    """
    found = _parts(prepared, trained, device, longest or prepared.train.longest)
    return MemoryEstimate(tuple(part for part in found if part.bytes))


def describe_memory(estimate: MemoryEstimate, objective: Objective) -> str:
    """Return the estimate as a sentence, which says what the reference model takes."""
    parts = ", ".join(f"{part.name} {format_bytes(part.bytes)}" for part in estimate.parts)
    shared = (
        "; the reference model is the base with the trained change switched off, and takes none"
        if objective.compares_with_base
        else ""
    )
    return (
        f"training will take about {format_bytes(estimate.total)} of memory at its peak, without the libraries; this "
        f"is an estimate: {parts}{shared}"
    )


def _parts(prepared: PreparedRun, trained: int, device: Arithmetic, longest: int) -> Iterator[MemoryPart]:
    config, checkpoint = prepared.config, prepared.base.checkpoint
    yield MemoryPart("weights", _weight_bytes(checkpoint, config.quantization, device))
    if isinstance(config.adapter, SelectiveMethod):
        yield MemoryPart("trained weights in f32", trained * (4 - device.stored))
        yield MemoryPart("copy of them as in the base", 2 * trained)
    else:
        yield MemoryPart("adapter", 4 * (trained + config.adapter.count_frozen(linear_layers(checkpoint))))
    yield MemoryPart("gradients", 4 * trained)
    yield MemoryPart("optimizer", trained * OPTIMIZERS[config.training.optimizer].bytes)
    if isinstance(config.objective, Distillation) and not config.objective.is_remote:
        yield MemoryPart("teacher", _teacher_bytes(Path(config.objective.teacher), device))
    yield from _of_batch(prepared, device, longest)


def _weight_bytes(checkpoint: Checkpoint, quantization: QuantizationConfig, device: Arithmetic) -> float:
    counts = {name: math.prod(info.shape) for name, info in checkpoint.tensors.items()}
    everything = sum(counts.values())
    if quantization.bits not in _ROUNDED:
        return everything * device.stored
    rounded = sum(rows * columns for rows, columns in linear_layers(checkpoint).values())
    scales = 0.0
    if quantization.bits == 4:  # a scale for each 64 weights, itself in 8 bits with double quantization
        scales = (1 + 4 / 256) / 64 if quantization.double_quant else 4 / 64
    return rounded * (_ROUNDED[quantization.bits] + scales) + (everything - rounded) * device.stored


def _teacher_bytes(directory: Path, device: Arithmetic) -> float:
    try:
        tensors = Checkpoint(directory).tensors
    except CheckpointError:  # transformers may still read it
        return float(sum(file.stat().st_size for file in directory.glob("*.safetensors")))
    return sum(math.prod(info.shape) for info in tensors.values()) * device.stored


def _of_batch(prepared: PreparedRun, device: Arithmetic, length: int) -> Iterator[MemoryPart]:
    """Yield activations and logits of the largest batch."""
    config = prepared.config
    objective, training = config.objective, config.training
    model = completed_config(prepared.base.checkpoint.config)
    rows = training.batch_size * objective.facts.rows_per_example
    if isinstance(objective, Online):
        length = max(len(prompt.prompt_ids) for prompt in prepared.train.prompts) + objective.max_completion_length
        cache = 2 * model.layers * model.kv_heads * model.head_dim * device.computed
        yield MemoryPart("key-value cache of the answers", rows * training.gradient_accumulation * length * cache)
    if isinstance(config.adapter, VirtualTokenMethod):
        length += config.adapter.tokens
    stated = model.get("intermediate_size")
    ffn = stated if isinstance(stated, int) and stated else 4 * model.hidden
    layer: float = rows * length * (LAYER_COPIES * model.hidden + FFN_COPIES * ffn) * device.computed
    loss = _loss_bytes(prepared, rows * length, model.vocab_size, device)
    inputs: float = rows * length * model.hidden * device.computed * model.layers
    if not training.gradient_checkpointing:
        inputs, layer = layer * model.layers, 0.0
    # the loss comes before the backward pass of the layers, which are recomputed one at a time
    yield MemoryPart("activations", inputs + (layer if layer > loss else 0))
    yield MemoryPart("logits and loss", loss if loss >= layer else 0)


def _loss_bytes(prepared: PreparedRun, tokens: int, vocabulary: int, device: Arithmetic) -> float:
    """Return the bytes of the logits of a batch, and of what the loss and its gradients make of them."""
    objective, train = prepared.config.objective, prepared.train
    copies = objective.facts.logit_copies
    if isinstance(objective, Distillation):
        share = train.supervised / max(1, train.tokens)
        copies = None if objective.is_remote else TAUGHT_COPIES[0] + TAUGHT_COPIES[1] * share
    if copies is not None:
        return copies * tokens * vocabulary * 4
    tile_tokens, columns = min(tokens, TILE[0]), TILE[1]
    if device.is_gpu:
        return tile_tokens * columns * device.computed
    return tile_tokens * (columns + TILE_TEMPORARIES * min(vocabulary, columns)) * device.computed
