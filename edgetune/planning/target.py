"""Settings that fit a machine: `edgetune plan --target "8GB laptop"`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgetune.config import Config
from edgetune.errors import ConfigError
from edgetune.planning.artifact_figures import USUAL, PlannedFile, cache_bytes
from edgetune.planning.card import format_bytes
from edgetune.planning.memory import Arithmetic, estimate_memory
from edgetune.planning.prepare import PreparedRun

RESERVED = 1.5 * 2**30
"""Bytes that the operating system and the libraries take."""
_CONTEXT = 4096
_SHORTEST = 256
_UNITS = {"": 2**30, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\b", re.IGNORECASE)


def parse_target(text: str) -> float:
    """Return the bytes of memory that a target names: `8GB laptop`, `24 GiB`, or `16`, which is in GiB.

    Raises:
        ConfigError: It names no size.
    """
    match = _SIZE.search(text)
    size = float(match[1]) * _UNITS[match[2].lower()] if match else 0.0
    if size <= 0:
        raise ConfigError(
            f"--target {text!r} names no size of memory", "Give a number with a unit, such as --target '8GB laptop'"
        )
    return size


@dataclass(frozen=True)
class Proposal:
    """Settings that fit, and why."""

    settings: dict[str, Any]
    reasons: tuple[str, ...]


def propose(
    prepared: PreparedRun, trained: int, device: Arithmetic, files: Sequence[PlannedFile], memory: float
) -> Proposal:
    """Propose batch, length, rank and storage type for a machine with so many bytes of memory.

    Batches become smaller first, as accumulation keeps the optimizer's steps; then the base takes 4 bits, the rank
    falls, and last the rows are cut.

    Args:
        prepared: The training.
        trained: Its number of trained parameters.
        device: How the machine stores and computes numbers.
        files: The files that can be exported.
        memory: Bytes of the machine.

    Raises:
        ConfigError: No setting fits; the message says what the smallest takes.
    """
    room = memory - RESERVED
    smallest = None
    for variant in _variants(prepared):
        need = _need(variant, trained, device)
        smallest = need if smallest is None else min(smallest, need)
        if need <= room:
            file = _largest_file(prepared, files, room)
            return Proposal(_settings(variant, file), tuple(_reasons(prepared, variant, need, file, memory)))
    assert smallest is not None
    raise ConfigError(
        f"--target: no setting trains this base in {format_bytes(memory)}; the smallest takes "
        f"{format_bytes(smallest + RESERVED)} with system and libraries",
        "Take a smaller base, or a machine with more memory",
    )


@dataclass(frozen=True)
class _Variant:
    config: Config
    prepared: PreparedRun
    longest: int
    share: float = 1.0
    """Trained parameters as a share of the configured ones: they grow with the rank."""

    @property
    def rank(self) -> int | None:
        rank = getattr(self.config.adapter, "r", None)
        return rank if isinstance(rank, int) else None


def _variants(prepared: PreparedRun) -> Iterator[_Variant]:
    """Yield settings, the configured ones first, each needing less than most before it."""
    config, training = prepared.config, prepared.config.training
    longest = prepared.train.longest
    batches = list(_halves(training.batch_size, 1))
    ranks: list[int | None] = [None]
    rank = getattr(config.adapter, "r", None)
    if isinstance(rank, int) and rank > 4:
        ranks += [*_halves(rank // 2, 4)]
    lengths = [longest, *(each for each in _halves(longest // 2, _SHORTEST))] if longest > _SHORTEST else [longest]
    bits = [config.quantization.bits, *([4] if config.quantization.bits != 4 else [])]
    recompute = [training.gradient_checkpointing, *([] if training.gradient_checkpointing else [True])]
    for length, rank_, bit, recomputes, batch in itertools.product(lengths, ranks, bits, recompute, batches):
        accumulation = training.gradient_accumulation * (training.batch_size // batch)
        changed = training.model_copy(
            update={
                "batch_size": batch,
                "gradient_accumulation": accumulation,
                "gradient_checkpointing": recomputes,
                "max_length": training.max_length if length == longest else length,
            }
        )
        adapter = config.adapter if rank_ is None else config.adapter.model_copy(update={"r": rank_})
        quantization = config.quantization.model_copy(update={"bits": bit})
        new = config.model_copy(update={"training": changed, "adapter": adapter, "quantization": quantization})
        share = 1.0 if rank_ is None or not isinstance(rank, int) else rank_ / rank
        yield _Variant(new, replace(prepared, config=new), length, share)


def _halves(first: int, last: int) -> Iterator[int]:
    while first > last:
        yield first
        first //= 2
    yield max(first, last)


def _need(variant: _Variant, trained: int, device: Arithmetic) -> float:
    return estimate_memory(variant.prepared, round(trained * variant.share), device, variant.longest).total


def _largest_file(prepared: PreparedRun, files: Sequence[PlannedFile], room: float) -> PlannedFile | None:
    """Return the most faithful of the usual files that runs in the memory, with a cache of 4096 tokens."""
    fitting = {file.type: file for file in files if file.format == "gguf" and not file.fallback}
    cache = cache_bytes(prepared.base, _context(prepared))
    return next((fitting[type_] for type_ in USUAL if type_ in fitting and fitting[type_].bytes + cache <= room), None)


def _context(prepared: PreparedRun) -> int:
    context = prepared.base.context
    return min(_CONTEXT, context.tokens) if context else _CONTEXT


def _settings(variant: _Variant, file: PlannedFile | None) -> dict[str, Any]:
    training = variant.config.training
    settings: dict[str, Any] = {
        "training": {
            "batch_size": training.batch_size,
            "gradient_accumulation": training.gradient_accumulation,
            "max_length": training.max_length,
            "gradient_checkpointing": training.gradient_checkpointing,
        },
        "quantization": {"bits": variant.config.quantization.bits},
    }
    if variant.rank is not None:
        settings["adapter"] = {"r": variant.rank}
    if file is not None:
        settings["export"] = {"formats": ["gguf"], "types": [file.type]}
    return settings


def _reasons(
    prepared: PreparedRun, variant: _Variant, need: float, file: PlannedFile | None, memory: float
) -> Iterator[str]:
    before, after = prepared.config, variant.config
    yield (
        f"{format_bytes(need)} in training and {format_bytes(RESERVED)} for system and libraries, of "
        f"{format_bytes(memory)}"
    )
    if after.training.batch_size != before.training.batch_size:
        yield (
            f"batches of {after.training.batch_size} rows in place of {before.training.batch_size}, accumulated: the "
            f"optimizer sees {after.training.batch_size * after.training.gradient_accumulation} rows a step, as before"
        )
    if after.quantization.bits != before.quantization.bits:
        yield f"the base in 4 bits in place of {before.quantization.bits}"
    if after.training.gradient_checkpointing != before.training.gradient_checkpointing:
        yield "activations are recomputed in the backward pass"
    if variant.longest < prepared.train.longest:
        yield f"rows are cut at {variant.longest} tokens; the longest has {prepared.train.longest}"
    if file is not None:
        size, context = format_bytes(file.bytes), _context(prepared)
        yield f"{file.type} is the most faithful file that runs there: {size}, with a cache of {context} tokens"
    else:
        yield "no usual type of GGUF fits the memory, or the rows of this base"
