"""The pass itself: read and merge a block, convert the one before, write the one before that.

There are two streams, of tensors as GGUF has them and of tensors as the base has them. They are interleaved, so that
what both read comes from the disk once and the second time from the system's cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from numpy.typing import NDArray

from edgetune_converters.merge import Block
from edgetune_converters.outputs import Output
from edgetune_converters.overlap import Behind, ahead

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """One tensor on its way: its number in its stream, its shape, the bytes that are read, and who takes its blocks."""

    index: int
    shape: tuple[int, ...]
    bytes: int
    blocks: Iterator[Block]
    outputs: Sequence[Output]


def run(jobs: Sequence[Job], threads: int, progress: Progress | None) -> None:
    """Do all jobs in order; `progress` is called with the bytes read so far and in all."""
    total = sum(job.bytes for job in jobs)
    with Behind() as write:
        for job, block, done in ahead(_blocks(jobs)):
            stored = [output.convert(job.index, block, threads) for output in job.outputs]
            write(partial(_append, job.outputs, stored))
            if progress is not None:
                progress(done, total)


def _blocks(jobs: Sequence[Job]) -> Iterator[tuple[Job, Block, int]]:
    """A job, a block of its tensor, and the bytes of the base that were read by then."""
    before = 0
    for job in jobs:
        weights, read = math.prod(job.shape), 0
        for block in job.blocks:
            read += block.rows.size
            yield job, block, before + job.bytes * read // weights
        before += job.bytes


def _append(outputs: Sequence[Output], stored: Sequence[NDArray[Any]]) -> None:
    for output, rows in zip(outputs, stored, strict=True):
        output.append(rows)
