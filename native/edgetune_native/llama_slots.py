"""Sequences that llama.cpp continues together, in a loop in C over libllama."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _backend

__all__ = ["LlamaSlots", "has_llama_slots"]

_NAMES = {"darwin": "libllama.dylib", "win32": "llama.dll"}
_LOST_PREFIX = -1000  # llama_slots.c

Chosen = tuple[int, int, bytes | None, float | None, tuple[tuple[int, float], ...], int]
"""(slot, token, its bytes, its log-probability, the most likely tokens with theirs, GUESSED + NEAR_TIE).

Bytes are None if there are more than 256.
"""
GUESSED = 1
"""It was guessed."""
NEAR_TIE = 2
"""Another token had nearly the same logit in a batch with guesses: it was chosen again, in a batch without."""
MOST_DRAFTED = 7
COSTED_ROWS = (1, 2, 4, 8, 16, 32)


class PrefixLostError(Exception):
    """The cache of a slot could not be cut, and what stood before the text went with it."""


def has_llama_slots() -> bool:
    """Whether the loop is there: not in the NumPy reference backend."""
    return hasattr(_backend.kernels, "llama_new")


@functools.cache
def _native() -> Any:
    """Return the C extension with libllama opened. Raises ImportError without llama-cpp-python."""
    native = import_module("edgetune_native._native")
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("llama-cpp-python is not installed: pip install llama-cpp-python")
    native.llama_open(str(Path(spec.submodule_search_locations[0]) / "lib" / _NAMES.get(sys.platform, "libllama.so")))
    return native


class LlamaSlots:
    """The slots of a llama_context, whose sequences have the numbers of the slots.

    One thread calls all methods but `interrupt`. All numbers and sizes are checked; addresses are not.
    """

    def __init__(
        self, context: int, vocab: int, stop: int, *, slots: int, room: int, offset: int, batch: int, piece: int,
        vocabulary_size: int, is_exact: bool,
    ) -> None:  # fmt: skip
        """Allocate the memory around a context.

        Args:
            context: Address of the llama_context.
            vocab: Address of the llama_vocab.
            stop: Address of the byte that the abort callback of the context reads.
            slots: Sequences of the context.
            room: Tokens that a prompt and its answer may have together.
            offset: Tokens in the cache of each sequence before its text.
            batch: Tokens of a batch.
            piece: Tokens of prompts in a batch with running answers.
            vocabulary_size: Logits V of a row that count.
            is_exact: Whether each batch has one sequence.
        """
        self._native = _native()
        self._slots = self._native.llama_new(
            context, vocab, stop, slots, room, offset, batch, piece, vocabulary_size, is_exact
        )

    def match(self, slot: int, ids: NDArray[np.int32]) -> int:
        """Return how many of `ids` [n] the cache of a slot begins with."""
        return int(self._native.llama_match(self._slots, slot, ids, len(ids)))

    def start(
        self, slot: int, ids: NDArray[np.int32], *, kept: int, chain: int, top_k: int, likely: int, draft: int,
        group: int,
    ) -> int:  # fmt: skip
        """Begin with a prompt in a free slot; return how many of its tokens the cache had.

        Args:
            slot: A slot that is not running.
            ids: Prompt [n].
            kept: Tokens of the prompt to take from the cache, at most `match` and below n.
            chain: Address of the llama_sampler, which lives until `stop`; 0 takes the most likely token.
            top_k: k of the chain's first sampler, if that is top-k; else 0.
            likely: Tokens whose log-probabilities come with each token; -1: none, not even its own.
            draft: Tokens that are guessed from the sequence and verified together; only without a chain.
            group: Only sequences of the same group are evaluated together.

        Raises:
            PrefixLostError: Put the prefix into the cache again, then start again.
        """
        found = int(
            self._native.llama_start(self._slots, slot, ids, len(ids), kept, chain, top_k, likely, draft, group)
        )
        if found == _LOST_PREFIX:
            raise PrefixLostError
        return found

    def copy(self, source: int, target: int) -> bool:
        """Copy the cache of a slot into one that is not running; return whether llama.cpp could."""
        return bool(self._native.llama_copy(self._slots, source, target))

    def set_table(self, cells: NDArray[np.uint64], longest: int) -> None:
        """Take drafts from a table of n-grams: cells as `edgetune.runtime.ngrams` describes them, which are copied."""
        self._native.llama_set_table(self._slots, np.ascontiguousarray(cells), len(cells), longest)

    def set_draft_model(self, context: int) -> None:
        """Take drafts from a llama_context of as many sequences, which is freed after the slots."""
        self._native.llama_set_draft_model(self._slots, context)

    def set_costs(self, costs: Sequence[float], *, adapts: bool) -> None:
        """State the time of batches of `COSTED_ROWS` rows, relative to the first; it decides how long drafts are.

        Args:
            costs: The times.
            adapts: Whether times that are measured while answers are generated go before them, and guessing stops where
                it has cost time.
        """
        self._native.llama_set_costs(self._slots, *costs, adapts)

    def draft(self, slot: int, most: int) -> None:
        """Permit drafts of at most `most` tokens, up to `MOST_DRAFTED`, to a slot without chain until it stops."""
        self._native.llama_draft(self._slots, slot, most)

    @property
    def drafted(self) -> int:
        """Tokens that have been guessed and verified, right or wrong."""
        return int(self._native.llama_drafted(self._slots))

    def mask(self, slot: int, bits: NDArray[np.uint32] | None) -> None:
        """Permit only tokens with a bit in `bits` [ceil(V / 32)] for the next token; None permits all."""
        self._native.llama_mask(self._slots, slot, bits)

    def turn(self, group: int) -> tuple[int, list[Chosen]]:
        """Evaluate one batch of a group; return the status of llama_decode (0 OK, 2 interrupted) and the tokens."""
        status, chosen = self._native.llama_turn(self._slots, group)
        return status, chosen

    def stop(self, slot: int) -> None:
        """Free a slot; its cache stays for a prompt that begins alike."""
        self._native.llama_stop(self._slots, slot)

    @property
    def has_prompts(self) -> bool:
        """Whether prompts, or parts of them, have not been evaluated yet."""
        return bool(self._native.llama_has_prompts(self._slots))

    def interrupt(self) -> None:
        """End the batch that is being evaluated, if it has much of a prompt. Any thread may call this."""
        self._native.llama_interrupt(self._slots)

    def close(self) -> None:
        """Free the memory; the context is freed by its owner, afterwards."""
        self._native.llama_close(self._slots)
