"""The slots of an engine in one context of llama.cpp: the loop in C, and which cache a request continues."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

import edgetune_native
from edgetune.errors import RuntimeProblem
from edgetune.runtime.llama.context import BATCH, LlamaContext
from edgetune.runtime.llama.drafting import Drafting
from edgetune.runtime.llama_library import library
from edgetune.runtime.sampling import SamplerVocabulary, build_chain, first_top_k, penalized_tokens
from edgetune.runtime.slots import ChosenToken, LoadedAdapter, Slots, SlotTask
from edgetune_native.llama_slots import GUESSED, MOST_DRAFTED, NEAR_TIE, PrefixLostError

_PIECE = 128  # tokens of prompts in a batch with running answers, whose next tokens wait for it
_WORTH_COPYING = 32  # tokens: evaluating them takes longer than copying a cache
_INTERRUPTED = 2  # llama_decode, llama.h
_TURNS = 16  # with one set of adapters before those of other requests have their turns: switching takes milliseconds
Adapters = tuple[tuple[LoadedAdapter, float], ...]


@dataclass
class _SlotState:
    """What is known of a slot beside what the loop in C knows."""

    chain: Any = None
    length: int = 0
    """Tokens of its sequence."""
    used: int = 0
    """When it was taken last, in requests."""
    adapters: Adapters = ()
    """Those with which the cache was made."""
    is_running: bool = False


class EngineSlots(Slots):
    """Slots in the context of llama.cpp that was made for them and is closed with them."""

    admits_in_runtime_cache = steps_in_runtime_cache = False

    def __init__(
        self, context: LlamaContext, vocabulary: SamplerVocabulary, capacity: int, *, is_exact: bool, can_draft: bool,
        drafting: Drafting | None = None, costs: Sequence[float] | None = None, adapts: bool = False,
    ) -> None:  # fmt: skip
        """Take over a context.

        Args:
            context: A context of `capacity` sequences.
            vocabulary: The model's.
            capacity: Number of slots.
            is_exact: Whether each sequence is evaluated alone and from its start.
            can_draft: Whether tokens can be taken from the end of a sequence: not in recurrent models.
            drafting: Where drafts come from, beside prompt lookup; closed with the slots.
            costs: As in `Speculation`; None leaves it to the loop.
            adapts: As in `Speculation`.
        """
        self.capacity = capacity
        self._context, self._vocabulary, self._is_exact = context, vocabulary, is_exact
        self._lock = threading.Lock()
        self._states = [_SlotState() for _ in range(capacity)]
        self._requests = 0
        self._groups: list[Adapters] = [()]
        """Sets of adapters that requests have had; their numbers are those of the loop in C."""
        self._current = self._turns = 0
        self._can_draft = can_draft
        self._loop: edgetune_native.LlamaSlots | None = edgetune_native.LlamaSlots(
            context.address, vocabulary.pointer, context.stop_address, slots=capacity, room=vocabulary.context,
            offset=context.offset, batch=BATCH, piece=_PIECE, vocabulary_size=vocabulary.size, is_exact=is_exact,
        )  # fmt: skip
        self._drafting = drafting if can_draft and not is_exact else None
        if self._drafting:
            self._drafting.install(self._loop)
        if costs is not None:
            self._loop.set_costs(costs, adapts=adapts)
        if context.offset:
            for slot in range(capacity):
                context.begin(slot)

    @override
    def start(self, task: SlotTask) -> tuple[int, int]:
        loop = self._opened
        slot, kept = self._place(task)
        state = self._states[slot]
        state.chain, top_k = self._make_chain(task)
        address = ctypes.cast(state.chain, ctypes.c_void_p).value or 0 if state.chain is not None else 0
        ways = {
            "chain": address, "top_k": top_k, "likely": -1 if task.logprobs is None else task.logprobs,
            "draft": 0 if self._is_exact or not self._can_draft else task.lookup, "group": self._group(task.adapters),
        }  # fmt: skip
        try:
            cached = loop.start(slot, task.ids, kept=kept, **ways)
        except PrefixLostError:
            self._context.begin(slot)
            cached = loop.start(slot, task.ids, kept=0, **ways)
        if task.mask is not None:
            loop.mask(slot, task.mask)
        if self._drafting and task.speculates:
            loop.draft(slot, MOST_DRAFTED)
        self._requests += 1
        state.length, state.used, state.is_running = len(task.ids), self._requests, True
        state.adapters = task.adapters
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

    def _group(self, adapters: Adapters) -> int:
        """Return the number of a set of adapters."""
        if adapters not in self._groups:
            self._groups.append(adapters)
        return self._groups.index(adapters)

    def _place(self, task: SlotTask) -> tuple[int, int]:
        """Return the slot for a prompt, and how many of its tokens the cache of the slot has.

        A slot is continued if that keeps half of what is in it. Else the least recently used slot is taken, into which
        a longer match is copied.
        """
        free = [slot for slot, state in enumerate(self._states) if not state.is_running]
        oldest = min(free, key=lambda slot: (self._states[slot].used, slot))
        if self._is_exact:
            return oldest, 0
        loop, most = self._opened, len(task.ids) - 1
        matches = [
            min(loop.match(slot, task.ids), most) if state.adapters == task.adapters else 0
            for slot, state in enumerate(self._states)
        ]
        best = max(free, key=lambda slot: (matches[slot], -slot))
        source = max(range(self.capacity), key=matches.__getitem__)
        keeps_half = matches[best] > 0 and matches[best] * 2 >= self._states[best].length
        target = best if keeps_half else oldest
        if matches[source] >= matches[target] + _WORTH_COPYING and loop.copy(source, target):
            return target, matches[source]
        return target, matches[target]

    @override
    def turn(self) -> list[ChosenToken]:
        status, rows = self._opened.turn(self._choose_group())
        if status not in (0, _INTERRUPTED):
            reason = "there is no room in its context" if status == 1 else f"status {status}"
            raise RuntimeProblem(f"llama.cpp stopped: {reason}", "Start again")
        chosen = []
        for slot, token, text, logprob, likely, flags in rows:
            self._states[slot].length += 1
            bytes_ = self._vocabulary.token_bytes(token) if text is None else text
            ways = (bool(flags & GUESSED), bool(flags & NEAR_TIE))
            chosen.append(ChosenToken(slot, token, bytes_, logprob, likely, *ways))
        return chosen

    def _choose_group(self) -> int:
        """Return the set of adapters of this turn, and put it into the context."""
        if len(self._groups) == 1:
            return 0
        wanted = {self._groups.index(state.adapters) for state in self._states if state.is_running}
        self._turns += 1
        if wanted and (self._current not in wanted or self._turns > _TURNS):
            later = [group for group in wanted if group > self._current]
            chosen = min(later or wanted)
            if chosen != self._current:
                self._context.set_adapters(self._groups[chosen])
            self._current, self._turns = chosen, 0
        return self._current

    @override
    def forget_adapter(self, adapter: LoadedAdapter) -> None:
        if any(each is adapter for each, _ in self._groups[self._current]):
            self._context.set_adapters(())
            self._current = 0

    @override
    def set_mask(self, slot: int, mask: NDArray[np.uint32]) -> None:
        self._opened.mask(slot, mask)

    @property
    @override
    def has_prompts(self) -> bool:
        return self._opened.has_prompts

    @property
    @override
    def drafted(self) -> int:  # type: ignore[override]
        with self._lock:
            return self._loop.drafted if self._loop is not None and self._drafting else 0

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
            if self._drafting:
                self._drafting.close()

    @property
    def _opened(self) -> edgetune_native.LlamaSlots:
        if self._loop is None:
            raise RuntimeProblem("the slots have been closed")
        return self._loop
