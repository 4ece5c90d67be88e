"""The pass itself: read and merge a block, convert it for each output that takes it, write it.

Outputs may take different tensors: those of GGUF, or those of the base. Such streams are interleaved, so that what both
read comes from the disk once and the second time from the system's cache.
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
    """One tensor on its way, and who takes its blocks under which number."""

    tensor: StreamTensor
    takers: list[tuple[int, StreamedOutput]]


class _Converted(NamedTuple):
    """One block, and as each taker stores it."""

    job: _Job
    block: RowBlock
    stored: list[Any]


def run(outputs: Sequence[StreamedOutput], checkpoint: Checkpoint, threads: int, progress: Progress) -> None:
    """Give every output its tensors; `progress` is called with the bytes read so far and in all."""
    jobs = list(_jobs(outputs))
    checkpoint.expect(_reads(jobs, checkpoint))
    total = sum(job.tensor.source_bytes for job in jobs)
    workers, threads = split_threads(threads)
    before = done = 0
    for job, block, stored in run_in_order(_calls(jobs, checkpoint, threads), workers):
        for (_, output), rows in zip(job.takers, stored, strict=True):
            output.append(rows)
        block.release()  # only now: what is stored may be the rows themselves
        done += block.rows.size
        whole = math.prod(job.tensor.shape)
        progress(before + job.tensor.source_bytes * done // whole, total)
        if done == whole:
            before, done = before + job.tensor.source_bytes, 0


def _reads(jobs: Sequence[_Job], checkpoint: Checkpoint) -> dict[str, float]:
    """How often each of the base's tensors will be read; parts of one count as parts."""
    reads: dict[str, float] = {}
    for job in jobs:
        sources = [checkpoint.tensors[name] for name in job.tensor.sources if name in checkpoint.tensors]
        whole = sum(source.bytes for source in sources)
        for source in sources:
            reads[source.name] = reads.get(source.name, 0) + job.tensor.source_bytes / whole
    return reads


def _jobs(outputs: Sequence[StreamedOutput]) -> Iterator[_Job]:
    """The tensors of the first output, and after each what others make of the same sources.

    A tensor that several outputs take is made once for all of them.
    """
    queues = [(output, deque(enumerate(output.tensors))) for output in outputs]
    while leading := next((queue for _, queue in queues if queue), None):
        job = _next(leading[0][1], queues)
        yield job
        for _, queue in queues:
            while queue and queue[0][1].sources <= job.tensor.sources:
                yield _next(queue[0][1], queues)


def _next(tensor: StreamTensor, queues: Sequence[tuple[StreamedOutput, deque[tuple[int, StreamTensor]]]]) -> _Job:
    """The tensor for all outputs of which it is the next one."""
    takers = [(queue.popleft()[0], output) for output, queue in queues if queue and queue[0][1] is tensor]
    return _Job(tensor, takers)


def _calls(jobs: Sequence[_Job], checkpoint: Checkpoint, threads: int) -> Iterator[Callable[[], _Converted]]:
    for job in jobs:
        for make in job.tensor.pieces(checkpoint):
            yield partial(_converted, job, make, threads)


def _converted(job: _Job, make: MakeBlock, threads: int) -> _Converted:
    block = make(threads)
    return _Converted(job, block, [output.convert(number, block, threads) for number, output in job.takers])
