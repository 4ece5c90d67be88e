"""What is asked of an `Engine`, and what it gives: a request, the tokens of its answer, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

from edgetune.runtime.sampling import Sampling

_GREEDY = Sampling()
MAX_LOOKUP = 15
GrammarKind = Literal["gbnf", "lark", "regex", "json_schema"]


@dataclass(frozen=True)
class Grammar:
    """What the text of an answer must match, from its first to its last byte.

    Attributes:
        kind: How `text` is written: GBNF (llama.cpp), Lark (llguidance), a regular expression, or a JSON schema.
        text: The grammar; a JSON schema as JSON, `{}` for any JSON value.
    """

    kind: GrammarKind
    text: str

    @classmethod
    def json_schema(cls, schema: str) -> Self:
        """Return the grammar of a JSON schema, given as JSON."""
        return cls("json_schema", schema)


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt and how it is continued.

    Attributes:
        ids: Token ids of the prompt, with BOS if the model wants it.
        sampling: How tokens are chosen.
        max_tokens: Maximum number of new tokens; 0 evaluates nothing.
        stop: Strings that end the answer. They may span tokens, and are not part of it.
        stop_tokens: Tokens that end the answer, beside the model's own.
        ignore_eos: Whether the model's own stop tokens do not end the answer.
        logprobs: How many of the most likely tokens are returned with each token, with their log-probabilities; 0
            returns that of the token alone, None computes none.
        grammar: What the answer must match.
        adapters: Names of loaded adapters, each with the weight that multiplies its change; see `Engine.load_adapter`.
        lookup: Speculation by prompt lookup: tokens that are guessed at a time from what followed the same tokens
            before, and verified in one pass, at most 15; 0 guesses none. 3 and 7 suit the kernels. The answer is that
            without it. Guesses are made for GGUF files, where the most likely token is taken and no grammar is given.
        speculate: Whether tokens are guessed from the engine's table of n-grams or by its draft model, if it has any;
            see `Speculation`. They go before those of `lookup`.
    """

    ids: Sequence[int]
    sampling: Sampling = _GREEDY
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    grammar: Grammar | None = None
    adapters: tuple[tuple[str, float], ...] = ()
    lookup: int = 0
    speculate: bool = True


class TokenEvent(NamedTuple):
    """A token of an answer.

    Attributes:
        token: Its id.
        bytes_: Its UTF-8 bytes, which may be part of a character; none for a control token. The last token before a
            stop string has only the bytes before it.
        logprob: Natural logarithm of its probability in the model's distribution, before samplers change it; None if
            it was not asked for.
        top: The most likely tokens with their log-probabilities, the most likely first.
    """

    token: int
    bytes_: bytes
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """What an answer has cost so far.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        cached_tokens: Those whose keys and values were in the cache, from an earlier request.
        generated_tokens: Tokens that were generated, with the stop token and those of a stop string.
        queued_seconds: Time until the engine began with the request.
        prompt_seconds: Time from then until the first token.
        decode_seconds: Time for all further tokens.
        guessed_tokens: Generated tokens that were guessed right (`GenerationRequest.lookup` and `speculate`).
        near_ties: Generated tokens for which another one had nearly the same logit beside guesses. A batch of other
            shape rounds differently, and might have taken the other one: they were evaluated again without guesses.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    generated_tokens: int = 0
    queued_seconds: float = 0.0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    guessed_tokens: int = 0
    near_ties: int = 0

    @property
    def seconds(self) -> float:
        """Time since the request was submitted."""
        return self.queued_seconds + self.prompt_seconds + self.decode_seconds
