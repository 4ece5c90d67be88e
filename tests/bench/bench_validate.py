"""Scoring and comparing beside stock llama-perplexity: the same file, base file, threads and chunks, in turn.

    python -m tests.bench.bench_validate [--layers N] [--rounds N] [--chunks N] [--context N]

A random model of Llama-3.2-1B's shape (fewer --layers for a quick look) in q4_k_m. The base file holds random
distributions: what is in it has no say in the time. Each side is a process of its own, on one chunk and on all of them:
tokens/s are those of the chunks that lie between, every token that is fed counted, so that starting and loading are
left out on both sides; the whole is printed, too. The comparison's share is of our time for all chunks.
llama-perplexity is built once from the pinned source distribution (tests/validation/stock.py).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgetune.reference.llama_kld import KldBaseWriter, scored_positions
from edgetune_converters.gguf import reader
from tests.bench.models import LLAMA_1B, write_llama
from tests.export_requests import export
from tests.validation import stock

HERE = Path("build/bench")

OURS = """
import sys, time
from pathlib import Path
from edgetune.reference.llama_kld import KldBaseFile
from edgetune.validation.llama_perplexity import measure_against_base_file
spent = 0.0
compare = KldBaseFile.compare
def timed(self, *arguments, **options):
    global spent
    begin = time.perf_counter()
    try:
        return compare(self, *arguments, **options)
    finally:
        spent += time.perf_counter() - begin
KldBaseFile.compare = timed
base, file, threads = KldBaseFile(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3])
figures = measure_against_base_file(base, file, threads, lambda *_: None)
print(spent)
"""


@dataclass(frozen=True)
class Cost:
    """One run of one side."""

    seconds: float
    peak: float
    """Bytes."""
    comparing: float = 0.0
    """Seconds."""


def _run(command: list[str]) -> tuple[Cost, str]:
    begin = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout is not None
    said = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{command[0]} failed")
    return Cost(time.perf_counter() - begin, usage.ru_maxrss * 1024.0), said


def _ours(base: Path, file: Path, threads: int) -> Cost:
    cost, said = _run([sys.executable, "-c", OURS, str(base), str(file), str(threads)])
    return Cost(cost.seconds, cost.peak, float(said))


def _theirs(base: Path, file: Path, threads: int, context: int) -> Cost:
    arguments = ["-m", str(file), "-c", str(context), "-b", str(context), "-t", str(threads)]
    return _run([str(stock.program()), *arguments, "--kl-divergence", "--kl-divergence-base", str(base)])[0]


def _write_base(path: Path, vocab: int, chunks: int, context: int) -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(0, min(vocab, 1000), (chunks, context)).astype(np.int32)
    rows = random.normal(0, 3, (len(scored_positions(context)), vocab)).astype(np.float32)
    with KldBaseWriter(path, tokens, vocab) as writer:
        for _ in range(chunks):
            writer.add(rows)


def _prepare(layers: int, context: int, counts: Sequence[int]) -> tuple[Path, list[Path]]:
    """The file, and a base file for each number of chunks."""
    HERE.mkdir(parents=True, exist_ok=True)
    model, file = HERE / f"base-{layers}", HERE / f"validate-{layers}.gguf"
    if not (model / "config.json").exists():
        write_llama(model, LLAMA_1B._replace(layers=layers))
    if not file.exists():
        export(model, {"q4_k_m": file})
    tokens = reader.read(file).metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    bases = [HERE / f"validate-{count}-{context}.kld" for count in counts]
    for count, base in zip(counts, bases, strict=True):
        _write_base(base, len(tokens), count, context)
    return file, bases


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunks", type=int, default=6)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    stock.program()
    file, bases = _prepare(options.layers, options.context, (1, options.chunks))
    ours: list[list[Cost]] = [[], []]
    theirs: list[list[Cost]] = [[], []]
    for _ in range(options.rounds):
        for which, base in enumerate(bases):
            ours[which].append(_ours(base, file, options.threads))
            theirs[which].append(_theirs(base, file, options.threads, options.context))
    _print(options.context, options.chunks, ours, theirs)


def _print(context: int, chunks: int, ours: list[list[Cost]], theirs: list[list[Cost]]) -> None:
    few, many = ([statistics.median(cost.seconds for cost in side[n]) for side in (ours, theirs)] for n in (0, 1))
    between = [(chunks - 1) * context / (long - short) for short, long in zip(few, many, strict=True)]
    whole = [chunks * context / long for long in many]
    print(f"{chunks} chunks of {context} tokens, median of {len(ours[0])}:     ours   theirs (llama-perplexity)")
    print(
        f"tokens/s, starting and loading left out  {between[0]:8.1f} {between[1]:8.1f}   x{between[0] / between[1]:.2f}"
    )
    print(f"tokens/s of the whole process            {whole[0]:8.1f} {whole[1]:8.1f}   x{whole[0] / whole[1]:.2f}")
    peaks = [statistics.median(cost.peak for cost in side[1]) / 1e6 for side in (ours, theirs)]
    print(f"peak memory, MB (the file and the base file are mapped) {peaks[0]:8.0f} {peaks[1]:8.0f}")
    share = statistics.median(cost.comparing / cost.seconds for cost in ours[1])
    print(f"comparing: {share:.1%} of our time")


if __name__ == "__main__":
    main()
