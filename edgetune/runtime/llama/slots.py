"""The slots of an engine in one context of llama.cpp: the loop in C, and which cache a request continues."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

import edgetune_native
from edgetune.errors import RuntimeProblem
from edgetune.runtime.llama.context import BATCH, LlamaContext
from edgetune.runtime.llama_library import library
from edgetune.runtime.sampling import SamplerVocabulary, build_chain, first_top_k, penalized_tokens
from edgetune.runtime.slots import ChosenToken, Slots, SlotTask
from edgetune_native.llama_slots import PrefixLostError

_PIECE = 128  # tokens of prompts in a batch with running answers, whose next tokens wait for it
_WORTH_COPYING = 32  # tokens: evaluating them takes longer than copying a cache
_INTERRUPTED = 2  # llama_decode, llama.h


@dataclass
class _SlotState:
    """What is known of a slot beside what the loop in C knows."""

    chain: Any = None
    length: int = 0
    """Tokens of its sequence."""
    used: int = 0
    """When it was taken last, in requests."""
    is_running: bool = False


class EngineSlots(Slots):
    """Slots in the context of llama.cpp that was made for them and is closed with them."""

    admits_in_runtime_cache = steps_in_runtime_cache = False

    def __init__(self, context: LlamaContext, vocabulary: SamplerVocabulary, capacity: int, *, is_exact: bool) -> None:
        """Take over the context of `capacity` sequences; `is_exact`: each is evaluated alone and from its start."""
        self.capacity = capacity
        self._context, self._vocabulary, self._is_exact = context, vocabulary, is_exact
        self._lock = threading.Lock()
        self._states = [_SlotState() for _ in range(capacity)]
        self._requests = 0
        self._loop: edgetune_native.LlamaSlots | None = edgetune_native.LlamaSlots(
            context.address, vocabulary.pointer, context.stop_address, slots=capacity, room=vocabulary.context,
            offset=context.offset, batch=BATCH, piece=_PIECE, vocabulary_size=vocabulary.size, is_exact=is_exact,
        )  # fmt: skip
        if context.offset:
            for slot in range(capacity):
                context.begin(slot)

    @override
    def start(self, task: SlotTask) -> tuple[int, int]:
        loop = self._opened
        slot, kept = self._place(task.ids)
        state = self._states[slot]
        state.chain, top_k = self._make_chain(task)
        address = ctypes.cast(state.chain, ctypes.c_void_p).value or 0 if state.chain is not None else 0
        ways = {"chain": address, "top_k": top_k, "likely": -1 if task.logprobs is None else task.logprobs}
        try:
            cached = loop.start(slot, task.ids, kept=kept, draft=0, **ways)
        except PrefixLostError:
            self._context.begin(slot)
            cached = loop.start(slot, task.ids, kept=0, draft=0, **ways)
        if task.mask is not None:
            loop.mask(slot, task.mask)
        self._requests += 1
        state.length, state.used, state.is_running = len(task.ids), self._requests, True
        return slot, cached

    def _make_chain(self, task: SlotTask) -> tuple[Any, int]:
        """Return the sampler chain of a task, None where the most likely token is taken, and its leading top_k."""
        task.sampling.check(self._vocabulary.size)
        if task.sampling.is_greedy:
            return None, 0
        chain, names = build_chain(task.sampling, self._vocabulary)
        count = penalized_tokens(task.sampling, self._vocabulary)
        for token in task.ids[max(0, len(task.ids) - count) :].tolist() if count else ():
            library().llama_sampler_accept(chain, token)
        return chain, first_top_k(task.sampling, names)

    def _place(self, ids: NDArray[np.int32]) -> tuple[int, int]:
        """Return the slot for a prompt, and how many of its tokens the cache of the slot has.

        A slot is continued if that keeps half of what is in it. Else the least recently used slot is taken, into which
        a longer match is copied.
        """
        free = [slot for slot, state in enumerate(self._states) if not state.is_running]
        oldest = min(free, key=lambda slot: (self._states[slot].used, slot))
        if self._is_exact:
            return oldest, 0
        loop, most = self._opened, len(ids) - 1
        matches = [min(loop.match(slot, ids), most) for slot in range(self.capacity)]
        best = max(free, key=lambda slot: (matches[slot], -slot))
        source = max(range(self.capacity), key=matches.__getitem__)
        keeps_half = matches[best] > 0 and matches[best] * 2 >= self._states[best].length
        target = best if keeps_half else oldest
        if matches[source] >= matches[target] + _WORTH_COPYING and loop.copy(source, target):
            return target, matches[source]
        return target, matches[target]

    @override
    def turn(self) -> list[ChosenToken]:
        status, rows = self._opened.turn()
        if status not in (0, _INTERRUPTED):
            reason = "there is no room in its context" if status == 1 else f"status {status}"
            raise RuntimeProblem(f"llama.cpp stopped: {reason}", "Start again")
        chosen = []
        for slot, token, text, logprob, likely in rows:
            self._states[slot].length += 1
            bytes_ = self._vocabulary.token_bytes(token) if text is None else text
            chosen.append(ChosenToken(slot, token, bytes_, logprob, likely))
        return chosen

    @override
    def set_mask(self, slot: int, mask: NDArray[np.uint32]) -> None:
        self._opened.mask(slot, mask)

    @property
    @override
    def has_prompts(self) -> bool:
        return self._opened.has_prompts

    @override
    def stop(self, slot: int) -> None:
        self._opened.stop(slot)
        self._states[slot].is_running = False
        self._free_chain(slot)

    def _free_chain(self, slot: int) -> None:
        chain, self._states[slot].chain = self._states[slot].chain, None
        if chain is not None:
            library().llama_sampler_free(chain)

    @override
    def interrupt(self) -> None:
        with self._lock:
            if self._loop is not None:
                self._loop.interrupt()

    @override
    def resume(self) -> None:
        self._context.resume()

    @override
    def close(self) -> None:
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None:
            loop.close()
            for slot in range(self.capacity):
                self._free_chain(slot)
            self._context.close()

    @property
    def _opened(self) -> edgetune_native.LlamaSlots:
        if self._loop is None:
            raise RuntimeProblem("the slots have been closed")
        return self._loop
