"""Grammars and JSON schemas: which tokens may come next, compiled by llguidance for every runtime alike."""

from __future__ import annotations

import json
import threading
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import RuntimeProblem
from edgetune.runtime.generation_request import Grammar

if TYPE_CHECKING:
    from edgetune.runtime.interface import Runtime


class GrammarProblem(RuntimeProblem):
    """A grammar or a JSON schema that cannot be compiled; a server answers 400."""

    exit_code = 2


class GrammarCompiler:
    """Compiles grammars for the vocabulary of a runtime. Thread-safe."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> GrammarFilter:
        """Return the filter of an answer.

        Raises:
            GrammarProblem: The grammar cannot be compiled, or permits no text.
        """
        import llguidance

        with self._lock:
            tokenizer = self._tokenizer
        what = "the JSON schema" if grammar.kind == "json_schema" else "the grammar"
        try:
            source = _to_llguidance(llguidance, grammar)
        except Exception as error:  # noqa: BLE001 - of a parser that raises many kinds
            raise GrammarProblem(f"{what} cannot be compiled: {error}", "Correct it") from None
        matcher = llguidance.LLMatcher(tokenizer, source, log_level=0)
        if matcher.is_error():
            raise GrammarProblem(f"{what} cannot be compiled: {_first_line(matcher.get_error())}", "Correct it")
        return GrammarFilter(matcher, self._runtime.vocabulary_size, self._runtime.stop_tokens)

    @cached_property
    def _tokenizer(self) -> Any:
        """llguidance's view of the vocabulary; it takes a second for one of 150,000 tokens."""
        import llguidance

        return llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(self._runtime)), eos_token=_eos_tokens(self._runtime)
        )


def _eos_tokens(runtime: Runtime) -> list[int]:
    known = sorted(id_ for id_ in runtime.stop_tokens if 0 <= id_ < runtime.vocabulary_size)
    if not known:
        raise GrammarProblem(f"{runtime.path} has no stop token, which ends a text that a grammar describes")
    return known


class _Vocabulary:
    """The vocabulary as llguidance reads it."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.eos_token_id = _eos_tokens(runtime)[0]
        self.bos_token_id = runtime.bos_token
        self.special_token_ids: list[int] = []
        self.tokens = [self._text(id_) for id_ in range(runtime.vocabulary_size)]

    def _text(self, token: int) -> bytes:
        plain = self._runtime.token_bytes(token)
        if plain and token not in self._runtime.stop_tokens:
            return plain
        self.special_token_ids.append(token)
        return self._runtime.token_bytes(token, special=True)

    def __call__(self, text: str | bytes) -> list[int]:
        return self._runtime.tokenize(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


_WHITESPACE = r"( |\n{1,2}[ \t]{0,20})"
"""Between the tokens of JSON, as in llama.cpp: a weak model fills its context with an unlimited one."""


def _to_llguidance(llguidance: Any, grammar: Grammar) -> str:
    if grammar.kind == "json_schema":
        schema = json.loads(grammar.text)
        return str(llguidance.LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": _WHITESPACE}))
    return str(llguidance.grammar_from(grammar.kind, grammar.text))


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0]


class GrammarFilter:
    """Which tokens may come next in one answer.

    Attributes:
        is_complete: Whether nothing may follow any more.
    """

    def __init__(self, matcher: Any, vocabulary_size: int, stop_tokens: frozenset[int]) -> None:
        self._matcher = matcher
        self._stop_tokens = stop_tokens
        self._bits = np.zeros(-(-vocabulary_size // 32), np.uint32)
        self.is_complete = False

    def mask(self) -> NDArray[np.uint32]:
        """Return a bit for each token, 1 if it may come next, the lowest of each word first [ceil(V / 32)].

        The array is used again by the next call.

        Raises:
            GrammarProblem: No token may.
        """
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        if not self._bits.any():
            raise GrammarProblem("no token of the vocabulary continues the text that the grammar describes")
        return self._bits

    def accept(self, token: int) -> None:
        """Note the token that was chosen."""
        if token in self._stop_tokens:
            self.is_complete = True
            return
        self._matcher.consume_token(token)
        self._check()
        self.is_complete = bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarProblem(f"the grammar cannot be followed: {_first_line(self._matcher.get_error())}")
