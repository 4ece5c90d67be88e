"""Disk space of a run, estimated before training starts."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from edgetune.config import Config
from edgetune.data.masks import EncodedRow
from edgetune.errors import EnvironmentProblem
from edgetune.methods import Method
from edgetune.methods.selective import SelectiveMethod
from edgetune.planning.optimizers import OPTIMIZERS
from edgetune_converters.architectures import completed_config
from edgetune_converters.files.writable import existing_parent, why_not_writable
from edgetune_converters.reading.checkpoint import Checkpoint

MARGIN = 64 * 2**20  # logs, tokenizer, manifest, and what other processes write meanwhile
_NOT_ADAPTED = ("embed", "lm_head", "norm", "wte", "wpe")


def count_adapter_parameters(checkpoint: Checkpoint, method: Method) -> int:
    """Count the parameters of an adapter on every linear layer: an upper bound if only some are adapted."""
    if isinstance(method, SelectiveMethod):
        return method.count_in({name: info.shape for name, info in checkpoint.tensors.items()})
    layers = linear_layers(checkpoint)
    biased = {name: shape for name, shape in layers.items() if f"{name}.bias" in checkpoint.tensors}
    return method.count_trainable(layers) + method.count_of_biases(biased) + _count_saved_modules(checkpoint, method)


def linear_layers(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Return the shapes of the weights of the linear layers, by the name of the layer."""
    return {
        name.removesuffix(".weight"): (info.shape[0], info.shape[1])
        for name, info in checkpoint.tensors.items()
        if len(info.shape) == 2 and not any(part in name for part in _NOT_ADAPTED)
    }


def _count_saved_modules(checkpoint: Checkpoint, method: Method) -> int:
    """Count the parameters of `modules_to_save`; a tied head is as large as the embedding."""
    wanted: list[str] = getattr(method, "modules_to_save", [])
    sizes = {name.rpartition(".")[0]: math.prod(info.shape) for name, info in checkpoint.tensors.items()}
    found = [
        next((size for name, size in sizes.items() if name == each or name.endswith(f".{each}")), None)
        for each in wanted
    ]
    return sum(max(sizes.values()) if size is None else size for size in found)


def estimate_run_bytes(config: Config, checkpoint: Checkpoint, reference_rows: Sequence[EncodedRow]) -> int:
    """Estimate the largest disk space of a run in bytes: adapter, checkpoints (one more than are kept), reference.

    The dequantized weights of a GGUF, GPTQ or AWQ base are on the disk while it is loaded, in up to 32 bits.
    """
    parameters = count_adapter_parameters(checkpoint, config.adapter)
    adapter = 4 * (parameters + config.adapter.count_frozen(linear_layers(checkpoint)))
    one_checkpoint = adapter + math.ceil(parameters * OPTIMIZERS[config.training.optimizer].bytes)
    vocabulary = completed_config(checkpoint.config).vocab_size
    full = vocabulary <= config.reference.full_vocabulary_limit
    per_position = 2 * vocabulary if full else 8 * config.reference.top_k
    positions = sum(len(row.scored) for row in reference_rows)
    checkpoints = (config.training.keep_checkpoints + 1) * one_checkpoint
    dequantized = dequantized_bytes(checkpoint)
    return adapter + checkpoints + positions * (per_position + 16) + dequantized + MARGIN


def dequantized_bytes(checkpoint: Checkpoint) -> int:
    """Return the bytes of the weights of a GGUF or packed base in 32 bits, 0 for others."""
    if not checkpoint.is_packed:
        return 0
    return sum(4 * math.prod(info.shape) for info in checkpoint.tensors.values())


def check_free_space(directory: Path, needed: int) -> None:
    """Raise EnvironmentProblem if `directory`, which need not exist, cannot be written or has too few bytes free."""
    why = why_not_writable(directory)
    if why:
        raise EnvironmentProblem(f"{directory} cannot be written: {why}", "Write elsewhere with -o")
    free = shutil.disk_usage(existing_parent(directory)).free
    if free < needed:
        raise EnvironmentProblem(
            f"{directory} needs about {needed / 2**20:.0f} MiB, and its disk has {free / 2**20:.0f} MiB free",
            "Free some space, write elsewhere with -o, or keep fewer checkpoints (training.keep_checkpoints)",
        )
