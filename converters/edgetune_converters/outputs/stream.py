"""The streaming pass: read and merge a block, convert it for each output, write it.

Outputs may take different tensors: those of GGUF, or those of the base. The two sequences are interleaved, so that
bytes which both need are read from disk once and from the page cache the second time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from edgetune_converters.files.ordered_pool import run_in_order, split_threads
from edgetune_converters.merging.stream import MakeBlock, RowBlock
from edgetune_converters.outputs.base import StreamedOutput, StreamTensor
from edgetune_converters.reading.checkpoint import Checkpoint

Progress = Callable[[int, int], None]


class _Job(NamedTuple):
    """A tensor, and the outputs that take its blocks, each with its index there."""

    tensor: StreamTensor
    takers: list[tuple[int, StreamedOutput]]


class _Converted(NamedTuple):
    """A block, and its rows as each output stores them."""

    job: _Job
    block: RowBlock
    stored: list[Any]


def run(outputs: Sequence[StreamedOutput], checkpoint: Checkpoint, threads: int, progress: Progress) -> None:
    """Feed every output its tensors. `progress` is called with the bytes read so far and in all."""
    jobs = list(_jobs(outputs))
    checkpoint.expect(_reads(jobs, checkpoint))
    total = sum(job.tensor.source_bytes for job in jobs)
    workers, threads = split_threads(threads)
    before = done = 0
    for job, block, stored in run_in_order(_calls(jobs, checkpoint, threads), workers):
        for (_, output), rows in zip(job.takers, stored, strict=True):
            output.append(rows)
        block.release()  # only now: the stored rows may be those of the block
        done += block.rows.size
        size = math.prod(job.tensor.shape)
        progress(before + job.tensor.source_bytes * done // size, total)
        if done == size:
            before, done = before + job.tensor.source_bytes, 0


def _reads(jobs: Sequence[_Job], checkpoint: Checkpoint) -> dict[str, float]:
    """Return how often each of the base's tensors will be read; a part counts as a fraction."""
    reads: dict[str, float] = {}
    for job in jobs:
        sources = [checkpoint.tensors[name] for name in job.tensor.sources if name in checkpoint.tensors]
        total = sum(source.bytes for source in sources)
        for source in sources:
            reads[source.name] = reads.get(source.name, 0) + job.tensor.source_bytes / total
    return reads


def _jobs(outputs: Sequence[StreamedOutput]) -> Iterator[_Job]:
    """Yield the tensors of the first output, each followed by those that others make of the same sources.

    A tensor that several outputs take is made once.
    """
    queues = [(output, deque(enumerate(output.tensors))) for output in outputs]
    while leading := next((queue for _, queue in queues if queue), None):
        job = _next(leading[0][1], queues)
        yield job
        for _, queue in queues:
            while queue and queue[0][1].sources <= job.tensor.sources:
                yield _next(queue[0][1], queues)


def _next(tensor: StreamTensor, queues: Sequence[tuple[StreamedOutput, deque[tuple[int, StreamTensor]]]]) -> _Job:
    """Return the job of a tensor for all outputs that take it next."""
    takers = [(queue.popleft()[0], output) for output, queue in queues if queue and queue[0][1] is tensor]
    return _Job(tensor, takers)


def _calls(jobs: Sequence[_Job], checkpoint: Checkpoint, threads: int) -> Iterator[Callable[[], _Converted]]:
    for job in jobs:
        for make in job.tensor.pieces(checkpoint):
            yield partial(_converted, job, make, threads)


def _converted(job: _Job, make: MakeBlock, threads: int) -> _Converted:
    block = make(threads)
    return _Converted(job, block, [output.convert(number, block, threads) for number, output in job.takers])
