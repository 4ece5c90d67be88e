"""Memory of a training at its peak, estimated before weights are loaded.

What is stored (weights, adapter, gradients, optimizer, teacher) is counted. What a forward and backward pass needs is
estimated from the shapes of the largest batch, with factors that were measured on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from edgetune.config import Config, QuantizationConfig
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
STORED_COPIES = (10, 3.5)
"""Arrays of either size that a layer keeps for the backward pass, if its activations are stored."""
TAUGHT_COPIES = (2.0, 8.0)
"""Arrays [tokens, vocabulary] and [trained tokens, vocabulary] of a distillation from a local teacher."""
TILE = (4096, 32768)
"""Tokens and columns of the vocabulary of a tile of TRL's log-probabilities (trl.kernels.chunked_logprob)."""
TILE_TEMPORARIES = 7
"""Arrays of the size of a tile beside the tile itself, where the processor computes it: a GPU has a kernel for it."""
LOGIT_BLOCK = 32 * 2**20
"""Largest block of logits in bytes, where the processor computes the loss."""
BLOCK_COPIES = 2
"""Arrays of the size of a block that it needs."""
USABLE = 0.8
"""Share of the free memory that a training takes by itself."""
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
class TrainingLayout:
    """What a training keeps in memory, and what it computes again."""

    resident: bool
    """Whether the dequantized weights of a quantized base are kept."""
    checkpointing: bool
    """Whether activations are recomputed in the backward pass."""

    def describe(self) -> str:
        """Return what is kept and what is computed again, in words."""
        weights = "keeping dequantized weights" if self.resident else "dequantizing weights at each use"
        activations = (
            "recomputing activations (gradient checkpointing)" if self.checkpointing else "storing activations"
        )
        return f"{weights} and {activations}"


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
    prepared: PreparedRun,
    trained: int,
    device: Arithmetic,
    longest: int | None = None,
    layout: TrainingLayout | None = None,
) -> MemoryEstimate:
    """Estimate the memory of a training at its peak.

    Args:
        prepared: The training.
        trained: Number of trained parameters.
        device: How it stores and computes numbers.
        longest: Tokens of the longest row; None: that of the training rows.
        layout: What it keeps in memory. None: what the configuration states, and no more where that is `auto`.
    """
    layout = layouts(prepared.config)[-1] if layout is None else layout
    found = _parts(prepared, trained, device, layout, longest or prepared.train.longest)
    return MemoryEstimate(tuple(part for part in found if part.bytes))


def layouts(config: Config) -> list[TrainingLayout]:
    """Return the layouts that the configuration leaves open, the fastest first and the smallest last.

    Recomputing activations costs about a third of a step, dequantizing weights less.
    """
    resident = {"auto": (True, False)}.get(str(config.quantization.resident), (config.quantization.resident is True,))
    stated = config.training.gradient_checkpointing
    checkpointing = (False, True) if stated == "auto" and config.adapter.takes_checkpointing else (stated is True,)
    if config.quantization.bits not in _ROUNDED:
        resident = (False,)
    return [TrainingLayout(kept, again) for again, kept in product(checkpointing, resident)]


def choose_layout(prepared: PreparedRun, trained: int, device: Arithmetic, free: float) -> TrainingLayout:
    """Return the fastest layout that fits into `free` bytes; the smallest if none does."""
    found = layouts(prepared.config)
    fitting = (each for each in found if estimate_memory(prepared, trained, device, layout=each).total <= USABLE * free)
    return next(fitting, found[-1])


def describe_layout(layout: TrainingLayout, config: Config, free: float) -> str | None:
    """Return why the training keeps what it keeps, as a sentence; None where the configuration states all of it."""
    if len(layouts(config)) == 1:
        return None
    return f"{layout.describe()}: {format_bytes(free)} of memory are free"


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


def _parts(
    prepared: PreparedRun, trained: int, device: Arithmetic, layout: TrainingLayout, longest: int
) -> Iterator[MemoryPart]:
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
    if layout.resident:
        kept = sum(rows * columns for rows, columns in linear_layers(checkpoint).values())
        yield MemoryPart("dequantized weights", kept * device.computed)
    yield from _of_batch(prepared, device, layout, longest)


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


def _of_batch(prepared: PreparedRun, device: Arithmetic, layout: TrainingLayout, length: int) -> Iterator[MemoryPart]:
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
    if not layout.checkpointing:
        of_hidden, of_ffn = STORED_COPIES
        kept = rows * length * (of_hidden * model.hidden + of_ffn * ffn) * device.computed
        inputs, layer = kept * model.layers, 0.0
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
    supervised = tokens * _supervised_share(prepared)
    if device.is_gpu:
        return min(supervised, TILE[0]) * TILE[1] * device.computed
    if isinstance(prepared.config.adapter, SelectiveMethod):  # TRL computes the gradient of the output matrix
        temporaries = TILE[1] + TILE_TEMPORARIES * min(vocabulary, TILE[1])
        hidden = completed_config(prepared.base.checkpoint.config).hidden
        return min(supervised, TILE[0]) * temporaries * device.computed + vocabulary * hidden * 4
    return BLOCK_COPIES * min(supervised * vocabulary * 4, max(LOGIT_BLOCK, vocabulary * 4))


def _supervised_share(prepared: PreparedRun) -> float:
    """Return the share of the tokens whose log-probabilities the loss reads."""
    objective, train = prepared.config.objective, prepared.train
    if isinstance(objective, Online):
        longest = max(len(prompt.prompt_ids) for prompt in train.prompts)
        return objective.max_completion_length / (longest + objective.max_completion_length)
    return train.supervised / train.tokens if train.tokens else 1.0
