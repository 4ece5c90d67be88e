"""Sampling: choose the next token from logits with llama.cpp's samplers, for every runtime alike."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import RuntimeProblem
from edgetune.runtime.llama_library import library

_RANDOM_SEED = 0xFFFFFFFF  # LLAMA_DEFAULT_SEED: llama.cpp draws a seed
_MIROSTAT_TOKENS = 100  # tokens from which mirostat 1 estimates the distribution, as in the paper
_ALL = -1


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, by llama.cpp's samplers in its default order.

    They apply in this order: logit_bias, the three penalties, DRY, top_k, typical_p, top_p, min_p, XTC, temperature,
    and last the random choice or Mirostat. With the default values the most likely token is taken (greedy decoding).

    Attributes:
        temperature: Sampling temperature; 0 takes the most likely token after the penalties.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Nucleus sampling: keep the most likely tokens up to this cumulative probability; 1 keeps all.
        min_p: Minimum probability relative to the most likely token; 0 keeps all.
        seed: Seed of the random numbers, 0 to 2**32 - 2; None draws one.
        logit_bias: Token id -> what is added to its logit; -inf excludes the token.
        repeat_penalty: Divides (or multiplies, if negative) the logits of recent tokens; 1 is off.
        presence_penalty: Subtracted from the logits of recent tokens; 0 is off.
        frequency_penalty: Subtracted from the logits of recent tokens for each time that they occur; 0 is off.
        repeat_last_n: Recent tokens, of prompt and answer, that the three penalties count; -1 counts all.
        dry_multiplier: Strength of DRY, which penalizes tokens that would continue a repetition; 0 is off.
        dry_base: Base of DRY's penalty, multiplier * base ** (length of the repetition - dry_allowed_length).
        dry_allowed_length: Length of a repetition that DRY does not penalize.
        dry_last_n: Recent tokens in which DRY looks for repetitions; -1 takes all.
        dry_breakers: Strings over which a repetition does not extend.
        typical_p: Locally typical sampling; 1 keeps all.
        xtc_probability: Probability of XTC, which excludes the most likely tokens but one; 0 is off.
        xtc_threshold: Probability above which XTC excludes a token; above 0.5 none is.
        mirostat: 0, or the version 1 or 2 of Mirostat, which takes the place of top_k, top_p, min_p, typical_p and XTC.
        mirostat_tau: Surprise in bits that Mirostat aims at.
        mirostat_eta: Learning rate of Mirostat.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = 64
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_last_n: int = _ALL
    dry_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    typical_p: float = 1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken, whatever came before."""
        return self.temperature <= 0 and not (self.logit_bias or self.has_penalties or self.has_dry or self.mirostat)

    @property
    def has_penalties(self) -> bool:
        """Whether recent tokens are penalized."""
        changes = self.repeat_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        return changes and self.repeat_last_n != 0

    @property
    def has_dry(self) -> bool:
        """Whether DRY is on."""
        return self.dry_multiplier > 0 and self.dry_last_n != 0

    def check(self, vocabulary_size: int) -> None:
        """Raise RuntimeProblem, which names the field, if a value is out of range or excludes another one.

        Args:
            vocabulary_size: Token ids of `logit_bias` are below it.
        """
        for name, (is_valid, hint) in _RANGES.items():
            value = getattr(self, name)
            if not _is_number(value) or not is_valid(value):
                raise RuntimeProblem(f"{name} is {value!r}", f"Give {hint}")
        if self.seed is not None and not (type(self.seed) is int and 0 <= self.seed < _RANDOM_SEED):
            raise RuntimeProblem(f"seed is {self.seed!r}", f"Give an integer from 0 to {_RANDOM_SEED - 1}, or none")
        for token, bias in self.logit_bias.items():
            if type(token) is not int or not 0 <= token < vocabulary_size:
                raise RuntimeProblem(
                    f"logit_bias has token {token!r}, and the vocabulary {vocabulary_size} tokens",
                    "Give ids of tokens",
                )
            if not _is_number(bias) or math.isnan(bias) or bias == math.inf:
                raise RuntimeProblem(f"logit_bias of token {token} is {bias!r}", "Give a number, or -inf")
        if self.mirostat:
            defaults = Sampling()
            for name in _NOT_WITH_MIROSTAT:
                if getattr(self, name) != getattr(defaults, name):
                    raise RuntimeProblem(f"mirostat takes the place of {name}", f"Give mirostat or {name}, not both")
            if self.temperature <= 0:
                raise RuntimeProblem("mirostat needs a temperature above 0", "Give a temperature, for instance 0.8")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_Range = tuple[Callable[[Any], bool], str]
_COUNT: _Range = (lambda v: isinstance(v, int) and 0 <= v < 2**31, "an integer of at least 0")
_LAST: _Range = (lambda v: isinstance(v, int) and -1 <= v < 2**31, "an integer of at least -1")
_POSITIVE: _Range = (lambda v: 0 < v < math.inf, "a number above 0")
_FROM_0: _Range = (lambda v: 0 <= v < math.inf, "a number of at least 0")
_FINITE: _Range = (lambda v: math.isfinite(v), "a number")
_PROBABILITY: _Range = (lambda v: 0 <= v <= 1, "a number from 0 to 1")
_RANGES: dict[str, _Range] = {
    "temperature": _FROM_0, "top_k": _COUNT, "top_p": _PROBABILITY, "min_p": _PROBABILITY,
    "repeat_penalty": _POSITIVE, "presence_penalty": _FINITE, "frequency_penalty": _FINITE, "repeat_last_n": _LAST,
    "dry_multiplier": _FROM_0, "dry_base": _POSITIVE, "dry_allowed_length": _COUNT, "dry_last_n": _LAST,
    "typical_p": _PROBABILITY, "xtc_probability": _PROBABILITY, "xtc_threshold": _PROBABILITY,
    "mirostat": (lambda v: v in (0, 1, 2), "0, 1 or 2"), "mirostat_tau": _FROM_0, "mirostat_eta": _FROM_0,
}  # fmt: skip
_NOT_WITH_MIROSTAT = ("top_k", "top_p", "min_p", "typical_p", "xtc_probability")


class SamplerVocabulary(NamedTuple):
    """What samplers need to know of a model."""

    size: int
    """Width V of the logits."""
    context: int
    """Tokens that a prompt and its answer may have together: the meaning of -1 in `repeat_last_n` and `dry_last_n`."""
    token_bytes: Callable[[int], bytes]
    """The bytes of a token, in which the breakers of DRY are looked for."""
    pointer: Any = None
    """llama.cpp's vocabulary, which finds those breakers itself; None for a model that it has not loaded."""


_Make = Callable[[Any, Sampling, SamplerVocabulary], Any]


def _seed(s: Sampling) -> int:
    return _RANDOM_SEED if s.seed is None else s.seed


def _last(count: int, vocabulary: SamplerVocabulary) -> int:
    return vocabulary.context if count == _ALL else count


def _make_bias(lib: Any, s: Sampling, v: SamplerVocabulary) -> Any:
    biases = (lib.llama_logit_bias * len(s.logit_bias))(*s.logit_bias.items())
    return lib.llama_sampler_init_logit_bias(v.size, len(biases), biases)


def _make_penalties(lib: Any, s: Sampling, v: SamplerVocabulary) -> Any:
    return lib.llama_sampler_init_penalties(
        v.size, _last(s.repeat_last_n, v), s.repeat_penalty, s.frequency_penalty, s.presence_penalty
    )


def _make_dry(lib: Any, s: Sampling, v: SamplerVocabulary) -> Any:
    breakers = [breaker.encode() for breaker in s.dry_breakers] if v.pointer is not None else []
    return lib.llama_sampler_init_dry(
        v.pointer, s.dry_multiplier, s.dry_base, s.dry_allowed_length, _last(s.dry_last_n, v),
        (ctypes.c_char_p * len(breakers))(*breakers), len(breakers),
    )  # fmt: skip


def _make_mirostat(lib: Any, s: Sampling, v: SamplerVocabulary) -> Any:
    if s.mirostat == 2:
        return lib.llama_sampler_init_mirostat_v2(_seed(s), s.mirostat_tau, s.mirostat_eta)
    return lib.llama_sampler_init_mirostat(v.size, _seed(s), s.mirostat_tau, s.mirostat_eta, _MIROSTAT_TOKENS)


# llama.cpp's samplers in its default order, each with the condition for adding it
_SAMPLERS: dict[str, tuple[Callable[[Sampling], bool], _Make]] = {
    "logit_bias": (lambda s: bool(s.logit_bias), _make_bias),
    "penalties": (lambda s: s.has_penalties, _make_penalties),
    "dry": (lambda s: s.has_dry, _make_dry),
    "top_k": (lambda s: s.top_k > 0, lambda lib, s, v: lib.llama_sampler_init_top_k(s.top_k)),
    "typical": (lambda s: s.typical_p < 1, lambda lib, s, v: lib.llama_sampler_init_typical(s.typical_p, 1)),
    "top_p": (lambda s: s.top_p < 1, lambda lib, s, v: lib.llama_sampler_init_top_p(s.top_p, 1)),
    "min_p": (lambda s: s.min_p > 0, lambda lib, s, v: lib.llama_sampler_init_min_p(s.min_p, 1)),
    "xtc": (
        lambda s: s.xtc_probability > 0,
        lambda lib, s, v: lib.llama_sampler_init_xtc(s.xtc_probability, s.xtc_threshold, 1, _seed(s)),
    ),
    "temperature": (lambda s: s.temperature > 0, lambda lib, s, v: lib.llama_sampler_init_temp(s.temperature)),
    "mirostat": (lambda s: s.mirostat > 0, _make_mirostat),
    "greedy": (lambda s: s.temperature <= 0, lambda lib, s, v: lib.llama_sampler_init_greedy()),
    "distribution": (
        lambda s: s.temperature > 0 and not s.mirostat,
        lambda lib, s, v: lib.llama_sampler_init_dist(_seed(s)),
    ),
}


def build_chain(sampling: Sampling, vocabulary: SamplerVocabulary) -> tuple[Any, list[str]]:
    """Return a sampler chain of llama.cpp, which the caller frees, and the names of its samplers in order."""
    lib = library()
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    names = [name for name, (applies, _) in _SAMPLERS.items() if applies(sampling)]
    for name in names:
        lib.llama_sampler_chain_add(chain, _SAMPLERS[name][1](lib, sampling, vocabulary))  # the chain owns it
    return chain, names


def first_top_k(sampling: Sampling, names: Sequence[str]) -> int:
    """Return k if top-k is the first sampler of a chain, which then needs only the most likely tokens; else 0."""
    return sampling.top_k if names[:1] == ["top_k"] else 0


def penalized_tokens(sampling: Sampling, vocabulary: SamplerVocabulary) -> int:
    """Return how many recent tokens the samplers look at."""
    penalties = _last(sampling.repeat_last_n, vocabulary) if sampling.has_penalties else 0
    return max(penalties, _last(sampling.dry_last_n, vocabulary) if sampling.has_dry else 0)


_GROUP = 64
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data, llama.h


class Sampler:
    """The sampler chain of one sequence. Close it after use."""

    def __init__(self, sampling: Sampling, vocabulary: SamplerVocabulary) -> None:
        """Build the chain. Raises RuntimeProblem for values that `Sampling.check` refuses."""
        sampling.check(vocabulary.size)
        self._chain: Any = None
        self._array = np.empty(0, _CANDIDATE)
        self._remembered = penalized_tokens(sampling, vocabulary)
        self._breakers: _Breakers | None = None
        self._top_k = 0
        if not sampling.is_greedy:
            self._library = library()
            if sampling.has_dry and vocabulary.pointer is None:
                self._breakers = _Breakers(sampling.dry_breakers, vocabulary)
            self._chain, self._names = build_chain(sampling, vocabulary)
            self._top_k = first_top_k(sampling, self._names)

    def accept_prompt(self, ids: Sequence[int]) -> None:
        """Note the tokens of the prompt, which penalties and DRY count."""
        for token in ids[max(0, len(ids) - self._remembered) :] if self._remembered else ():
            self._accept(int(token))

    def choose(self, logits: NDArray[np.float32], mask: NDArray[np.bool_] | None = None) -> int:
        """Return the next token for logits [V].

        Greedy decoding bypasses llama.cpp's chain, which needs an array of V candidates: 0.4 ms a token at a
        vocabulary of 152k, against 0.02 ms for the argmax.

        Args:
            logits: Logits [V].
            mask: Whether each token is permitted [V]; None permits all. At least one must be.
        """
        if self._chain is None:
            return int((logits if mask is None else np.where(mask, logits, np.float32(-np.inf))).argmax())
        ids = _preselect(logits, self._top_k) if mask is None else np.flatnonzero(mask)
        candidates = self._candidates(logits, ids)
        self._library.llama_sampler_apply(self._chain, candidates)
        chosen = int(candidates.data[candidates.selected].id)
        self._accept(chosen)
        return chosen

    def _accept(self, token: int) -> None:
        if self._breakers is None:
            self._library.llama_sampler_accept(self._chain, token)
            return
        for index, name in enumerate(self._names):
            seen = self._breakers.replace(token) if name == "dry" else token
            self._library.llama_sampler_accept(self._library.llama_sampler_chain_get(self._chain, index), seen)

    def _candidates(self, logits: NDArray[np.float32], ids: NDArray[np.int64]) -> Any:
        """Return the llama_token_data_array of the tokens `ids`."""
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


class _Breakers:
    """The breakers of DRY for a model whose vocabulary llama.cpp does not have.

    A token with a breaker in it is given to DRY as an id that occurs once, so that no repetition extends over it.
    """

    def __init__(self, breakers: Sequence[str], vocabulary: SamplerVocabulary) -> None:
        long = next((breaker for breaker in breakers if len(breaker.encode()) > 1), None)
        if long is not None:
            raise RuntimeProblem(
                f"dry_breakers has {long!r}, and an ONNX model takes breakers of one ASCII character",
                "Give single characters, or run the GGUF file",
            )
        self._breakers = [breaker.encode() for breaker in breakers]
        self._token_bytes = vocabulary.token_bytes
        self._next = vocabulary.size

    def replace(self, token: int) -> int:
        """Return the id that DRY is given for a token."""
        text = self._token_bytes(token)
        if not any(breaker in text for breaker in self._breakers):
            return token
        self._next += 1
        return self._next


def _preselect(logits: NDArray[np.float32], top_k: int) -> NDArray[np.int64]:
    """Return token ids in increasing order that include the `top_k` most likely ones; all ids if `top_k` is 0.

    The k-th largest group maximum is at most the k-th largest logit, so it is a safe threshold. At a vocabulary of 128k
    and k = 40 it leaves about a hundred candidates, in a twentieth of the time that llama.cpp takes for all.
    """
    groups = len(logits) // _GROUP
    if not 0 < top_k < groups:
        return np.arange(len(logits))
    maxima = logits[: groups * _GROUP].reshape(groups, _GROUP).max(axis=1)
    return np.flatnonzero(logits >= np.partition(maxima, -top_k)[-top_k])
