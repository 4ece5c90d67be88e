"""Choosing the next token from logits, whoever computed them: llama.cpp's samplers on an array of candidates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.runtime.interface import Sampling
from edgetune.runtime.llama.library import library

_RANDOM_SEED = 0xFFFFFFFF  # LLAMA_DEFAULT_SEED: llama.cpp draws one

# What each field of Sampling adds to llama.cpp's chain, in llama.cpp's own default order.
_FILTERS: list[tuple[Callable[[Sampling], bool], Callable[[Any, Sampling], Any]]] = [
    (lambda s: s.top_k > 0, lambda lib, s: lib.llama_sampler_init_top_k(s.top_k)),
    (lambda s: s.top_p < 1, lambda lib, s: lib.llama_sampler_init_top_p(s.top_p, 1)),
    (lambda s: s.min_p > 0, lambda lib, s: lib.llama_sampler_init_min_p(s.min_p, 1)),
    (lambda s: True, lambda lib, s: lib.llama_sampler_init_temp(s.temperature)),
    (lambda s: True, lambda lib, s: lib.llama_sampler_init_dist(_RANDOM_SEED if s.seed is None else s.seed)),
]
_GROUP = 64
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data, llama.h


class Sampler:
    """Chooses tokens for one answer. Close it after use."""

    def __init__(self, sampling: Sampling) -> None:
        self._chain: Any = None
        self._array = np.empty(0, _CANDIDATE)
        self._top_k = sampling.top_k
        if not sampling.is_greedy:
            self._library = library()
            self._chain = self._build(sampling)

    def _build(self, sampling: Sampling) -> Any:
        chain = self._library.llama_sampler_chain_init(self._library.llama_sampler_chain_default_params())
        for applies, make in _FILTERS:
            if applies(sampling):
                self._library.llama_sampler_chain_add(chain, make(self._library, sampling))  # the chain owns it
        return chain

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token after logits [V].

        Greedy does not go through llama.cpp's chain, which needs an array of V candidates: 0.4 ms a token at a
        vocabulary of 152k against 0.02 ms for an arg-max.
        """
        if self._chain is None:
            return int(logits.argmax())
        candidates = self._candidates(logits)
        self._library.llama_sampler_apply(self._chain, candidates)
        chosen = int(candidates.data[candidates.selected].id)
        self._library.llama_sampler_accept(self._chain, chosen)
        return chosen

    def _candidates(self, logits: NDArray[np.float32]) -> Any:
        """llama_token_data_array of all tokens that top_k may keep."""
        ids = _likeliest(logits, self._top_k)
        if len(self._array) < len(ids):
            self._array = np.zeros(len(ids), _CANDIDATE)
        array = self._array[: len(ids)]
        array["id"] = ids
        array["logit"] = logits[ids] if len(ids) < len(logits) else logits
        data = array.ctypes.data_as(self._library.llama_token_data_p)
        return self._library.llama_token_data_array(data, len(ids), -1, False)

    def close(self) -> None:
        """Free the chain."""
        if self._chain is not None:
            self._library.llama_sampler_free(self._chain)
            self._chain = None


def _likeliest(logits: NDArray[np.float32], top_k: int) -> NDArray[np.int64]:
    """Ids in increasing order, among them the `top_k` likeliest; all for 0.

    The k-th largest of the maxima of groups is no more than the k-th largest of all. At a vocabulary of 128k and k = 40
    this leaves some hundred candidates, for a twentieth of the time that handing all of them to llama.cpp takes.
    """
    groups = len(logits) // _GROUP
    if not 0 < top_k < groups:
        return np.arange(len(logits))
    maxima = logits[: groups * _GROUP].reshape(groups, _GROUP).max(axis=1)
    return np.flatnonzero(logits >= np.partition(maxima, -top_k)[-top_k])
