"""The interface of all runtimes. A new one subclasses `Runtime` and adds a row to `loading.RUNTIMES`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from edgetune.data.answer_frame import NO_FRAME, AnswerFrame, find_frame
from edgetune.data.chat import ChatTemplate, Message
from edgetune.errors import RuntimeProblem
from edgetune.runtime.batching import (
    Completion,
    DecodingOptions,
    EndCheck,
    Prompt,
    SequenceBatch,
    SingleSequence,
    completions,
    decode,
)
from edgetune.runtime.hidden_mass import HiddenMass
from edgetune.runtime.sampling import SamplerVocabulary, Sampling
from edgetune.runtime.slots import SPECULATION, BatchSlots, LoadedAdapter, Slots, Speculation
from edgetune.runtime.text import Answer, Generation, Utf8Stream

GREEDY = Sampling()
MAX_TOKENS = 512
"""Default length of an answer."""

Pooling = Literal["mean", "last"]
"""How the hidden states of tokens become the embedding of a text."""

Scoring = tuple[NDArray[np.int32], NDArray[np.int64]]
"""Token ids [n] of a text, and the increasing positions p (1 <= p < n) of the tokens to score."""


class NoChatTemplate(RuntimeProblem):
    """The file has no chat template to render a conversation with."""

    exit_code = 2


class Runtime(ABC):
    """An exported model that is ready to run on the CPU. A context manager; not thread-safe.

    A subclass evaluates tokens with its library: it implements the abstract methods and may override `_make_batch` and
    `_score_together` where its library can evaluate several texts in one pass.

    Attributes:
        format: Format of the file: "gguf" or "onnx".
        path: File or directory as it was given.
        size: Bytes on disk of the weights and their description.
        is_quantized: Whether some weights have fewer than 16 bits.
        threads: Threads that evaluate the model.
        context: Tokens that a prompt and its answer may have together.
        trained_context: Tokens that the model was trained for.
        vocabulary_size: Width V of the logits.
        metadata: Metadata of the file.
        chat_template: Chat template of the file, or None.
        template_names: Names of the file's chat templates.
        bos_token: Token that starts a text, or None.
        stop_tokens: Tokens at which generation ends.
        is_reward_model: Whether the file has a score head (`reward_scores`).
        hidden_rows: Rows that a soft prompt adds to the vocabulary; their logits are left out.
    """

    format: ClassVar[str]
    path: Path
    size: int
    is_quantized: bool
    threads: int
    context: int
    trained_context: int
    vocabulary_size: int
    metadata: Mapping[str, Any]
    chat_template: ChatTemplate | None
    template_names: tuple[str, ...] = ()
    bos_token: int | None
    stop_tokens: frozenset[int]
    is_reward_model: bool = False
    hidden_rows: int = 0

    # -- text and tokens -----------------------------------------------------------------------------------------------

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of `text`. Special tokens in it are parsed; BOS is added once if the model wants it."""

    @abstractmethod
    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """Return the UTF-8 bytes of a token, which may be part of a character.

        Args:
            token: Token id.
            special: Whether a control token has its text instead of no bytes.

        Raises:
            ValueError: The id is outside the vocabulary.
        """

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without control tokens."""
        stream = Utf8Stream()
        return stream.feed(b"".join(self.token_bytes(token) for token in ids)) + stream.finish()

    def tokenize_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the token ids of a conversation, rendered by the file's chat template up to where the answer begins.

        Args:
            messages: Messages {"role", "content"}; the last one is the user's.
            tools: Tools that the template describes to the model, as JSON schemas.
            template_options: Variables of the template, in place of those of the same name that training gave it.

        Raises:
            NoChatTemplate: The file has no chat template.
            DataError: The template refuses the conversation.
            ConfigError: The template does not read an option.
        """
        if self.chat_template is None:
            names = self.template_names
            raise NoChatTemplate(
                f"{self.path} has no default chat template, only {', '.join(names)}"
                if names
                else f"{self.path} has no chat template",
                "Continue plain text (`--raw`, `Runtime.complete`), or export with a template",
            )
        template = self.chat_template
        if template_options:
            template.check_options(template_options)
            template = template.with_options(template_options)
        return self.tokenize(template.render(messages, add_generation_prompt=True, tools=tools))

    def answer_frame(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> AnswerFrame:
        """Return what the file's chat template writes around the answer; the arguments are those of `tokenize_chat`."""
        if self.chat_template is None:
            return NO_FRAME
        return find_frame(self.chat_template.with_options(template_options or {}), messages, tools, self.stop_texts)

    @cached_property
    def stop_texts(self) -> frozenset[str]:
        """Texts of the stop tokens."""
        known = (id_ for id_ in self.stop_tokens if 0 <= id_ < self.vocabulary_size)
        return frozenset(self.token_bytes(id_, special=True).decode("utf-8", "replace") for id_ in known)

    # -- answers -------------------------------------------------------------------------------------------------------

    def chat(
        self,
        messages: Sequence[Message],
        *,
        sampling: Sampling = GREEDY,
        max_tokens: int = MAX_TOKENS,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> Answer:
        """Answer a conversation; the arguments and errors are those of `tokenize_chat` and `generate`."""
        ids = self.tokenize_chat(messages, tools=tools, template_options=template_options)
        frame = self.answer_frame(messages, tools=tools, template_options=template_options)
        return self._answer(ids, sampling, max_tokens, frame)

    def complete(self, text: str, *, sampling: Sampling = GREEDY, max_tokens: int = MAX_TOKENS) -> Answer:
        """Continue plain text, without the chat template; the errors are those of `generate`."""
        return self._answer(self.tokenize(text), sampling, max_tokens)

    def _answer(self, ids: list[int], sampling: Sampling, max_tokens: int, frame: AnswerFrame = NO_FRAME) -> Answer:
        return Answer(ids, self.generate(ids, sampling, max_tokens), self.token_bytes, frame)

    def generate(self, ids: Sequence[int], sampling: Sampling = GREEDY, max_tokens: int = MAX_TOKENS) -> Generation:
        """Continue token ids; each new id is available as soon as it is chosen.

        Args:
            ids: Prompt, with BOS if the model wants it.
            sampling: How tokens are chosen.
            max_tokens: Maximum number of new tokens.

        Raises:
            RuntimeProblem: The prompt is empty, does not fit the context or has ids outside the vocabulary.
        """
        prompt = Prompt(0, self.check_prompt(ids, max_tokens), max_tokens)
        return Generation(decode(self._single_sequence(), [prompt], self._decoding_options(sampling)))

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        max_tokens: Sequence[int],
        is_ended: EndCheck | None = None,
    ) -> Iterator[Completion]:
        """Continue several prompts; return the completions in the order of the prompts.

        As many sequences as memory has room for are decoded together. Each completion is the one that `generate` gives;
        the seed applies to each prompt separately.

        Args:
            prompts: Token ids of each prompt.
            sampling: How tokens are chosen.
            max_tokens: Maximum number of new tokens of each prompt.
            is_ended: Called with (index of the prompt, new token); whether the answer ends with this token.

        Raises:
            RuntimeProblem: As for `generate`, before anything is evaluated.
        """
        checked = [
            Prompt(index, self.check_prompt(ids, limit), limit)
            for index, (ids, limit) in enumerate(zip(prompts, max_tokens, strict=True))
        ]
        if not checked:
            return iter(())
        length = min(self.context, max(len(prompt.ids) + prompt.max_tokens for prompt in checked))
        batch = self._make_batch(len(checked), length)
        return completions(decode(batch, checked, replace(self._decoding_options(sampling), is_ended=is_ended)))

    def _decoding_options(self, sampling: Sampling) -> DecodingOptions:
        sampling.check(self.vocabulary_size)
        return DecodingOptions(sampling, self.stop_tokens, self.context, self.sampler_vocabulary)

    @property
    def sampler_vocabulary(self) -> SamplerVocabulary:
        """What samplers need to know of the model."""
        return SamplerVocabulary(self.vocabulary_size, self.context, self.token_bytes)

    def _single_sequence(self) -> SequenceBatch:
        return SingleSequence(self._prefill, self._step)

    @property
    def adapters(self) -> Mapping[str, LoadedAdapter]:
        """Adapters that have been loaded, by name."""
        return {}

    def load_adapter(self, path: Path, name: str) -> None:
        """Load a GGUF adapter under a name, for `GenerationRequest.adapters` and `use_adapters`.

        Raises:
            RuntimeProblem: It is not an adapter of this model, the name is taken, or the runtime takes none.
        """
        raise RuntimeProblem(f"{self.path} takes no adapters", "Give a GGUF file")

    def unload_adapter(self, name: str) -> None:
        """Free an adapter that nothing uses. Raises RuntimeProblem for an unknown name."""
        self.find_adapters(((name, 1.0),))

    def use_adapters(self, adapters: Sequence[tuple[str, float]]) -> None:
        """Add the weighted changes of loaded adapters to the model in all that generates or scores from now on.

        Embeddings are those of the model without adapters.

        Raises:
            RuntimeProblem: A name is unknown, or a weight is not a number.
        """
        self.find_adapters(adapters)

    def find_adapters(self, adapters: Sequence[tuple[str, float]]) -> tuple[tuple[LoadedAdapter, float], ...]:
        """Return loaded adapters with their weights, without those of weight 0. Raises RuntimeProblem as above."""
        known = self.adapters
        for name, weight in adapters:
            if name not in known:
                have = f"loaded are {', '.join(known)}" if known else "none is loaded"
                raise RuntimeProblem(f"there is no adapter {name!r}; {have}", "Load it, or give another name")
            if not math.isfinite(weight):
                raise RuntimeProblem(
                    f"the weight of adapter {name!r} is {weight}", "Give a number, 1 for the whole change"
                )
        names = [name for name, _ in adapters]
        if len(set(names)) < len(names):
            raise RuntimeProblem(f"an adapter is named twice: {', '.join(names)}", "Name each once")
        return tuple((known[name], float(weight)) for name, weight in adapters if weight)

    def make_slots(self, count: int, *, is_exact: bool = False, speculation: Speculation = SPECULATION) -> Slots:
        """Return at most `count` places for the sequences of an `Engine`, each of `context` tokens.

        Args:
            count: Sequences that are evaluated together.
            is_exact: Whether each sequence is evaluated alone and from its start, so that its result is that of
                `generate` to the last bit.
            speculation: How tokens are guessed ahead.

        Raises:
            RuntimeProblem: There is no memory for them, or the draft model does not fit.
        """
        if speculation.draft is not None:
            raise RuntimeProblem(f"{self.path} takes no draft model", "Give a GGUF file, or leave the draft model out")
        batch = self._single_sequence() if is_exact else self._make_batch(count, self.context)
        return BatchSlots(batch, self.sampler_vocabulary, self.token_bytes)

    def _make_batch(self, count: int, length: int) -> SequenceBatch:
        """Return room for at most `count` sequences of `length` tokens."""
        return self._single_sequence()

    # -- measuring ---------------------------------------------------------------------------------------------------

    def evaluate_prompt(self, ids: NDArray[np.int32]) -> None:
        """Clear the cache and evaluate a checked prompt [n]."""
        self._prefill(ids)

    def evaluate_token(self, token: int, position: int) -> None:
        """Evaluate one more token, at a position [n] of the text."""
        self._step(token, position)

    def evaluate_rows(self, ids: NDArray[np.int32], position: int) -> bool:
        """Evaluate tokens together, with the logits of each, and drop them again; return whether that is possible."""
        return False

    @abstractmethod
    def _prefill(self, prompt: NDArray[np.int32]) -> NDArray[np.float32]:
        """Clear the cache, evaluate `prompt` and return the logits [V] after its last token."""

    @abstractmethod
    def _step(self, token: int, position: int) -> NDArray[np.float32]:
        """Evaluate one more token and return the logits [V] after it. The hot path of generation."""

    # -- scores --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def score(self, ids: NDArray[np.int32], positions: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        """Yield the logits that predict ids[p] from ids[:p] for all `positions` p, in blocks [m, V] of f32.

        A block is a view of the runtime's own buffer, valid until the next one. Tokens after the last position are not
        evaluated.

        Args:
            ids: Token ids [n] of a text.
            positions: Increasing positions, 1 <= p < n.

        Raises:
            RuntimeProblem: The text does not fit the context or has ids outside the vocabulary.
        """

    def score_batch(
        self, texts: Sequence[Scoring], mass: HiddenMass | None = None
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield (index of the text, block) with the blocks of `score` for several texts.

        The blocks of one text are in order; the texts are in any order. A block is valid until the next one.

        Args:
            texts: The texts.
            mass: Collects the probability of the hidden rows; the runtime generates nothing until the last block.

        Raises:
            RuntimeProblem: As for `score`, before anything is evaluated.
        """
        for ids, positions in texts:
            self.check_ids(ids[: positions[-1]] if len(positions) else ids[:0])
        if mass is None or not self.hidden_rows:
            yield from self._score_together(texts)
            return
        self._show_hidden_rows(shown=True)
        try:
            for index, block in self._score_together(texts):
                mass.add(block, self.vocabulary_size)
                yield index, np.ascontiguousarray(block[:, : self.vocabulary_size])
        finally:
            self._show_hidden_rows(shown=False)

    @abstractmethod
    def _show_hidden_rows(self, *, shown: bool) -> None:
        """Return the logits of the hidden rows too, or leave them out again."""

    def _score_together(self, texts: Sequence[Scoring]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Score checked texts, here one after another."""
        for index, (ids, positions) in enumerate(texts):
            yield from ((index, block) for block in self.score(ids, positions))

    # -- embeddings ----------------------------------------------------------------------------------------------------

    def embed(self, ids: Sequence[int], pooling: Pooling = "mean") -> NDArray[np.float32]:
        """Return the embedding [n_embd] of a text from the last hidden states of its tokens, not normalized.

        Unlike the other methods it may be called while an `Engine` uses the runtime, from any thread.

        Args:
            ids: Token ids of the text.
            pooling: "mean" of the hidden states of all tokens, or the "last" one.

        Raises:
            RuntimeProblem: The text is empty or too long, or the file does not give its hidden states.
        """
        raise RuntimeProblem(
            f"{self.path} gives no hidden states, only logits", "Use a GGUF file of the model for embeddings"
        )

    def reward_scores(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return the score f32 [rows] that a reward model gives to each row of token ids, at its last token.

        Raises:
            RuntimeProblem: The file is no reward model, or a row is empty, too long or outside the vocabulary.
        """
        if not self.is_reward_model:
            raise RuntimeProblem(f"{self.path} is no reward model: it has no score head", "Export the run of one")
        texts = [np.asarray(row, np.int32) for row in rows]
        for text in texts:
            if not len(text):
                raise RuntimeProblem("a row to score is empty", "Give token ids, as tokenize_chat returns them")
            self.check_ids(text)
        return np.array(self._reward_scores(texts), np.float32)

    @abstractmethod
    def _reward_scores(self, rows: Sequence[NDArray[np.int32]]) -> list[float]:
        """Return the score of each checked row."""

    # -- the file ------------------------------------------------------------------------------------------------------

    def bind_input(self, name: str, buffer: NDArray[Any]) -> None:
        """Read a named input of the graph from `buffer`, whose contents may change between calls.

        Raises:
            RuntimeProblem: The model has no such input.
        """
        raise RuntimeProblem(f"{self.path} has no input {name!r}")

    @abstractmethod
    def verify(self) -> None:
        """Read all weights and compare them with the hash in the file, if it has one. Opening a file checks sizes only.

        Raises:
            ArtifactError: The weights are not those that were written.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the model. Idempotent; the runtime cannot be used afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- checks --------------------------------------------------------------------------------------------------------

    def check_prompt(self, ids: Sequence[int], max_tokens: int) -> NDArray[np.int32]:
        """Return the ids of a prompt [n]. Raises RuntimeProblem as `generate` does."""
        prompt = np.asarray(ids, np.int32)
        if not len(prompt):
            raise RuntimeProblem("the prompt is empty", "Give some text")
        if len(prompt) >= self.context:
            raise self._too_long(f"the prompt has {len(prompt)} tokens", len(prompt) + max_tokens)
        self.check_ids(prompt)
        return prompt

    def check_ids(self, ids: NDArray[np.int32]) -> None:
        """Raise RuntimeProblem if token ids [n] do not fit the context or are outside the vocabulary."""
        if len(ids) > self.context:
            raise self._too_long(f"a text has {len(ids)} tokens", len(ids))
        if len(ids) and (ids.min() < 0 or ids.max() >= self.vocabulary_size):
            outside = ids[(ids < 0) | (ids >= self.vocabulary_size)][0]
            raise RuntimeProblem(f"token {outside} is outside the vocabulary of {self.vocabulary_size} of {self.path}")

    def _too_long(self, what: str, needed: int) -> RuntimeProblem:
        hint = f"Ask for more with --context {needed}" if needed <= self.trained_context else "Shorten it"
        return RuntimeProblem(
            f"{what}, but the context is {self.context}", f"{hint}; the model was trained for {self.trained_context}"
        )
