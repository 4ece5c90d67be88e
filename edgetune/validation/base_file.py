"""A file against a llama.cpp base file: what `llama-perplexity --kl-divergence` measures, on any runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgetune.console import Progress
from edgetune.errors import DataError
from edgetune.reference.llama_kld import KldBaseFile, iterate_chunks, scored_positions, with_bos
from edgetune.runtime import Runtime, load
from edgetune.validation.metrics import Figures, TokenPairs, figures_of_pairs
from edgetune.validation.scoring import check_finite, in_cache


def measure(base: KldBaseFile, file: Path, threads: int | None, progress: Progress) -> Figures:
    """The figures of an exported file. DataError when the base file is of another vocabulary."""
    with load(file, threads=threads, context=base.context) as runtime:
        if runtime.vocabulary_size != base.vocab_size:
            raise DataError(
                f"{base.path} is of a vocabulary of {base.vocab_size} tokens, {file} has {runtime.vocabulary_size}",
                "Give the base file of the same model.",
            )
        return figures_of_pairs(_pairs(base, runtime, progress))


def _pairs(base: KldBaseFile, runtime: Runtime, progress: Progress) -> TokenPairs:
    """One block of logits is alive at a time.

    What follows the last token of a chunk is predicted, too, and not looked at: llama-perplexity feeds whole chunks,
    and with a token less in the batch the rounding of its products is another.
    """
    bos, parts = added_bos(runtime), []
    positions = np.append(scored_positions(base.context), base.context)
    for start, chunk in iterate_chunks(base):
        done, end = start, start + base.rows_per_chunk
        for logits in in_cache(runtime.score(with_bos(chunk, bos), positions)):
            known = logits[: end - done]
            if len(known):
                check_finite(runtime, known, done)
                parts.append(base.compare(done, known, threads=1))
            done += len(known)
        progress(done, base.rows)
    names = ("kld", "same_top", "nll", "nll_base")
    return TokenPairs(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def added_bos(runtime: Runtime) -> int | None:
    """BOS, if this vocabulary puts it before every text."""
    return runtime.bos_token if runtime.tokenize("")[:1] == [runtime.bos_token] else None
