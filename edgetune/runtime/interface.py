"""What every runtime offers. llama.cpp is one; another one implements `Runtime` and adds a row to `loading`."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from edgetune.data.chat import ChatTemplate
from edgetune.errors import EdgetuneError


class RuntimeProblem(EdgetuneError):
    """A file that cannot be run, or a request that does not fit it."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; in the order in which the filters apply."""

    temperature: float = 0.0
    """0 takes the most likely token (greedy); the rest is then without effect."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most likely tokens that together have this probability."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the most likely one."""
    seed: int | None = None
    """None draws one."""

    @property
    def is_greedy(self) -> bool:
        """Whether the same prompt always gives the same answer."""
        return self.temperature <= 0


class Finish(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    """The model said that it is done."""
    LENGTH = "length"
    """max_tokens were generated."""
    CONTEXT = "context"
    """The context is full."""


@dataclass(frozen=True)
class Completion:
    """A whole answer: its tokens, without the one at which it stopped, and why it ended."""

    tokens: list[int]
    finish: Finish


class Generation:
    """An iterator of token ids that knows, once exhausted, why it ended. The stop token itself is not among them."""

    def __init__(self, tokens: Generator[int | Finish, None, None]) -> None:
        self._tokens = tokens
        self.finish: Finish | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> int:
        if self.finish is not None:
            raise StopIteration
        token = next(self._tokens)
        if isinstance(token, Finish):
            self.finish = token
            self._tokens.close()
            raise StopIteration
        return token


Scoring = tuple[NDArray[np.int32], NDArray[np.int64]]
"""Ids of a text, and the positions in it that are scored."""


class Runtime(Protocol):
    """An exported model that is ready to run. A context manager; not for use by several threads at once."""

    path: Path
    size: int
    """Bytes on disk of weights and what describes them."""
    is_quantized: bool
    """Whether some weights are in less than 16 bits."""
    threads: int
    context: int
    """Tokens that a prompt and its answer may have together."""
    trained_context: int
    """Tokens the model was made for."""
    vocabulary_size: int
    """Width of the logits, V."""
    metadata: Mapping[str, Any]
    chat_template: ChatTemplate | None
    """The template in the file."""
    bos_token: int | None
    """The token that starts a text, if the model has one."""
    stop_tokens: frozenset[int]
    """Tokens at which generation ends."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids; special tokens in the text are recognised, and BOS, if the model wants one, is there once."""

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """The UTF-8 bytes of a token, which may be part of a character; empty for a control token unless `special`."""

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of some ids, control tokens left out."""

    def score(self, ids: NDArray[np.int32], positions: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        """Logits that predict ids[p] from ids[:p], for the increasing `positions` p >= 1, in blocks [m, V].

        A block is a view of the runtime's own buffer: valid until the next one is asked for.
        """

    def score_batch(self, rows: Sequence[Scoring]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """What `score` says of each row, as (number of the row, block); short rows are evaluated together.

        A row's blocks are in order, the rows in any. A block is valid until the next one is asked for.
        """

    def generate(self, ids: Sequence[int], sampling: Sampling, max_tokens: int) -> Generation:
        """Continue `ids`. RuntimeProblem when these alone do not fit the context."""

    def generate_batch(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_tokens: Sequence[int]
    ) -> Iterator[Completion]:
        """Continue several prompts, each by at most its `max_tokens`: what `generate` says of each, in their order.

        As many as memory has room for are evaluated at once, which takes hardly longer than one alone where reading
        the weights is what takes the time. A seed holds for each prompt anew. RuntimeProblem as for `generate`.
        """

    def verify(self) -> None:
        """Read all weights and compare them with the hash in the file, where it has one. ArtifactError if they differ.

        Opening a file looks at sizes only.
        """

    def close(self) -> None:
        """Give the memory back; the runtime is of no use afterwards."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...
