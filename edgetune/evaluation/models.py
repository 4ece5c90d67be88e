"""What the evaluation needs of a model, and an exported file as such a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgetune.data.chat import ChatTemplate
from edgetune.errors import RuntimeProblem
from edgetune.runtime import Runtime, Sampling
from edgetune.runtime.interface import Scoring
from edgetune.runtime.text import Utf8Stream


@dataclass(frozen=True)
class PromptToAnswer:
    """A prompt whose greedy answer ends at a stop token, at one of the texts `until`, or after `max_tokens`."""

    ids: list[int]
    until: tuple[str, ...]
    max_tokens: int


class EvaluatedModel(Protocol):
    """A causal language model with its tokenizer: the trained model in torch, or an exported file."""

    name: str
    context: int
    """Tokens that a prompt and its answer may have together."""
    trained_context: int
    """Tokens that the model was made for, without its virtual tokens."""
    prefix_token: int
    """The token before a text that has no context: BOS, or EOS where there is no BOS."""
    chat_template: ChatTemplate | None

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of `text`. Special tokens in it are parsed; BOS is added once if the model wants it."""
        ...

    def score_batch(self, texts: Sequence[Scoring]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield (index of the text, logits [m, V]) of its positions, in blocks; see `Runtime.score_batch`."""
        ...

    def answer(self, prompts: Sequence[PromptToAnswer]) -> Iterator[str]:
        """Yield the greedy answers in the order of the prompts, each cut before the first text of its `until`."""
        ...


class FileModel:
    """An exported file in its runtime."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.name = runtime.path.name
        self.context, self.trained_context = runtime.context, runtime.trained_context
        self.prefix_token = find_prefix_token(runtime)
        self.chat_template = runtime.chat_template

    def tokenize(self, text: str) -> list[int]:
        """See `EvaluatedModel`."""
        return self._runtime.tokenize(text)

    def score_batch(self, texts: Sequence[Scoring]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """See `EvaluatedModel`."""
        return self._runtime.score_batch(texts)

    def answer(self, prompts: Sequence[PromptToAnswer]) -> Iterator[str]:
        """Decode as many prompts together as the runtime has room for."""
        ends = [TextStop(prompt.until) for prompt in prompts]

        def is_ended(index: int, token: int) -> bool:
            return ends[index].feed(self._runtime.token_bytes(token))

        completions = self._runtime.generate_batch(
            [prompt.ids for prompt in prompts], Sampling(), [prompt.max_tokens for prompt in prompts], is_ended
        )
        for end, _ in zip(ends, completions, strict=True):
            yield end.text()


class TextStop:
    """The text of an answer, which ends before the first of some texts."""

    def __init__(self, until: Sequence[str]) -> None:
        self._until = [text for text in until if text]
        self._longest = max(map(len, self._until), default=0)
        self._stream = Utf8Stream()
        self._text = ""

    def feed(self, piece: bytes) -> bool:
        """Append the bytes of a token; return whether the answer ends with it."""
        new = self._stream.feed(piece)
        start = max(0, len(self._text) - self._longest)
        self._text += new
        return any(text in self._text[start:] for text in self._until)

    def text(self) -> str:
        """Return the answer."""
        return cut(self._text + self._stream.finish(), self._until)


def cut(text: str, until: Sequence[str]) -> str:
    """Return the text before the first of the texts `until`."""
    ends = [text.find(each) for each in until if each]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


def find_prefix_token(runtime: Runtime) -> int:
    """Return BOS, or EOS where there is no BOS. llama.cpp reports a BOS of its own for a GGUF file without one."""
    stated = [runtime.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")]
    candidates = [*stated, None if runtime.format == "gguf" else runtime.bos_token, *sorted(runtime.stop_tokens)]
    for token in candidates:
        if isinstance(token, int):
            return token
    raise RuntimeProblem(
        f"{runtime.path} names neither BOS nor EOS, one of which stands before a text without context",
        "Export the file again from a base whose tokenizer names one",
    )
