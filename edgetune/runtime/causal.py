"""What all runtimes do alike: checks before the work, the loop that generates, text from tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from edgetune.runtime.batching import Prompt, Rules, ScoreRequest, SequenceBatch, SingleSequence, complete, in_order
from edgetune.runtime.interface import Completion, Finish, Generation, RuntimeProblem, Sampling, Scoring
from edgetune.runtime.sampling import Sampler
from edgetune.runtime.text import Utf8Stream


class CausalRuntime(ABC):
    """The part of `Runtime` that does not depend on the library; a subclass evaluates tokens and knows the words."""

    path: Path
    context: int
    trained_context: int
    vocabulary_size: int
    stop_tokens: frozenset[int]

    @abstractmethod
    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """See Runtime."""

    @abstractmethod
    def close(self) -> None:
        """See Runtime."""

    @abstractmethod
    def _prefill(self, prompt: NDArray[np.int32]) -> NDArray[np.float32]:
        """Forget what was, evaluate `prompt`, and give the logits [V] after its last token."""

    @abstractmethod
    def _step(self, token: int, position: int) -> NDArray[np.float32]:
        """Evaluate one more token and give the logits [V] after it; the shortest way, as generating does only this."""

    def detokenize(self, ids: Sequence[int]) -> str:
        """See Runtime."""
        stream = Utf8Stream()
        return stream.feed(b"".join(self.token_bytes(token) for token in ids)) + stream.finish()

    @abstractmethod
    def score(self, ids: NDArray[np.int32], positions: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        """See Runtime."""

    def score_batch(self, rows: Sequence[Scoring]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """See Runtime."""
        for ids, positions in rows:
            self._check_ids(ids[: positions[-1]] if len(positions) else ids[:0])
        for group in self._groups([ScoreRequest.of(number, *row) for number, row in enumerate(rows) if len(row[1])]):
            if len(group) == 1:
                number = group[0].number
                yield from ((number, block) for block in self.score(*rows[number]))
            else:
                yield from self._score_together(group)

    def _groups(self, rows: list[ScoreRequest]) -> list[list[ScoreRequest]]:
        """Which rows are evaluated together: none, where a library does not override this."""
        return [[row] for row in rows]

    def _score_together(self, group: Sequence[ScoreRequest]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """The logits of a group of more than one."""
        raise NotImplementedError

    def generate(self, ids: Sequence[int], sampling: Sampling, max_tokens: int) -> Generation:
        """See Runtime."""
        return Generation(self._generate(self._prompt(ids, max_tokens), sampling, max_tokens))

    def generate_batch(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_tokens: Sequence[int]
    ) -> Iterator[Completion]:
        """See Runtime."""
        pairs = enumerate(zip(prompts, max_tokens, strict=True))
        asked = [Prompt(number, self._prompt(ids, most), most) for number, (ids, most) in pairs]
        if not asked:
            return iter(())
        length = min(self.context, max(len(prompt.ids) + prompt.max_tokens for prompt in asked))
        return in_order(
            complete(self._make_rows(len(asked), length), asked, Rules(sampling, self.stop_tokens, self.context))
        )

    def _make_rows(self, count: int, length: int) -> SequenceBatch:
        """Room for up to `count` rows of `length` tokens; a library that can have more than one overrides this."""
        return SingleSequence(self._prefill, self._step)

    def _prompt(self, ids: Sequence[int], max_tokens: int) -> NDArray[np.int32]:
        """Errors: RuntimeProblem for one that is empty or too long, or has ids that there are not."""
        prompt = np.asarray(ids, np.int32)
        if not len(prompt):
            raise RuntimeProblem("the prompt is empty", "Give some text.")
        if len(prompt) >= self.context:
            raise self._too_long(f"the prompt has {len(prompt)} tokens", len(prompt) + max_tokens)
        self._check_ids(prompt)
        return prompt

    def _generate(
        self, prompt: NDArray[np.int32], sampling: Sampling, max_tokens: int
    ) -> Generator[int | Finish, None, None]:
        sampler = Sampler(sampling)
        try:
            logits = self._prefill(prompt)
            last = len(prompt) + max_tokens - 1
            for position in range(len(prompt), last + 1):
                token = sampler.choose(logits)
                if token in self.stop_tokens:
                    yield Finish.STOP
                yield token
                if position >= self.context:
                    yield Finish.CONTEXT
                if position == last:
                    yield Finish.LENGTH
                logits = self._step(token, position)
        finally:
            sampler.close()

    def _check_ids(self, ids: NDArray[np.int32]) -> None:
        if len(ids) > self.context:
            raise self._too_long(f"a row has {len(ids)} tokens", len(ids))
        if len(ids) and (ids.min() < 0 or ids.max() >= self.vocabulary_size):
            outside = ids[(ids < 0) | (ids >= self.vocabulary_size)][0]
            raise RuntimeProblem(f"token {outside} is outside the vocabulary of {self.vocabulary_size} of {self.path}")

    def _too_long(self, what: str, needed: int) -> RuntimeProblem:
        hint = f"Ask for more with --context {needed}" if needed <= self.trained_context else "Shorten it"
        return RuntimeProblem(
            f"{what}, but the context is {self.context}", f"{hint}; the model was made for {self.trained_context}."
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
