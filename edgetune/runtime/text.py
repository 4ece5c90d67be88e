"""Text of an answer while it is generated: token bytes to characters, and how long they took."""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from edgetune.data.answer_frame import NO_FRAME, AnswerFrame, AnswerReader, Part, TextPiece
from edgetune.runtime.batching import Event, Finish


class Utf8Stream:
    """Incremental UTF-8 decoder: a token may end in the middle of 灯 or of an emoji, whose bytes are held back.

    Invalid bytes become U+FFFD, as in a decoder of the whole text.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, piece: bytes) -> str:
        """Return the characters that `piece` completes."""
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """Return what is left at the end of the bytes."""
        return self._decoder.decode(b"", final=True)


class Generation(Iterator[int]):
    """The token ids of an answer, each as soon as it is chosen. The stop token is not among them.

    Attributes:
        finish: Why the answer ended; None while it is being generated.
    """

    def __init__(self, events: Iterator[Event]) -> None:
        self._events = events
        self.finish: Finish | None = None

    def __next__(self) -> int:
        """Return the next token id."""
        if self.finish is not None:
            raise StopIteration
        _, event = next(self._events)
        if isinstance(event, Finish):
            self.finish = event
            next(self._events, None)  # let the loop clean up now
            raise StopIteration
        return event


@dataclass(frozen=True)
class Timing:
    """How long an answer took.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        tokens: Generated tokens.
        prompt_seconds: Time until the first generated token.
        decode_seconds: Time for all further tokens.
    """

    prompt_tokens: int
    tokens: int
    prompt_seconds: float
    decode_seconds: float

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / max(self.prompt_seconds, 1e-9)

    @property
    def decode_rate(self) -> float:
        """Generated tokens per second, without the first one; 0 for fewer than two."""
        return max(0, self.tokens - 1) / max(self.decode_seconds, 1e-9)


class TokenBytes(Protocol):
    """The bytes of a token; see `Runtime.token_bytes`."""

    def __call__(self, token: int, *, special: bool = False) -> bytes:
        """Return the bytes."""
        ...


def to_pieces(tokens: Iterable[int], token_bytes: TokenBytes) -> Iterator[TextPiece]:
    """Yield the text of tokens in pieces of complete characters; special tokens are pieces of their own."""
    stream = Utf8Stream()
    for token in tokens:
        plain = token_bytes(token)
        if not plain and (name := token_bytes(token, special=True)):
            yield TextPiece(name.decode("utf-8", "replace"), is_special=True)
        else:
            yield TextPiece(stream.feed(plain))
    yield TextPiece(stream.finish())


class Answer(Iterator[str]):
    """The text of an answer in pieces of complete characters, as it is generated.

    Iterate over the pieces, or call `text()` for the whole answer. What the chat template writes around an answer, and
    reasoning before it, are not among them; `parts()` yields the reasoning, too.

    Attributes:
        tokens: Token ids generated so far, without the stop token.
        thought: Reasoning so far.
    """

    def __init__(
        self, prompt: Sequence[int], generation: Generation, token_bytes: TokenBytes, frame: AnswerFrame = NO_FRAME
    ) -> None:
        """Decode the tokens of `generation`, which continues the token ids `prompt`, with `token_bytes`."""
        self.tokens: list[int] = []
        self.thought = ""
        self._prompt_tokens = len(prompt)
        self._generation, self._token_bytes = generation, token_bytes
        self._parts = self._read(AnswerReader(frame))
        self._pieces: list[str] = []
        self._started = time.perf_counter()
        self._first = self._last = self._started

    @property
    def finish(self) -> Finish | None:
        """Why the answer ended; None while it is being generated."""
        return self._generation.finish

    @property
    def timing(self) -> Timing:
        """How long the answer has taken so far."""
        return Timing(
            self._prompt_tokens, len(self.tokens), self._first - self._started, self._last - self._first
        )  # fmt: skip

    def text(self) -> str:
        """Generate the rest and return the whole answer, without reasoning."""
        for _ in self:
            pass
        return "".join(self._pieces)

    def __next__(self) -> str:
        """Return the next piece of text, which is not empty."""
        return next(part.text for part in self._parts if not part.is_thought)

    def parts(self) -> Iterator[Part]:
        """Yield the remaining pieces of reasoning and answer."""
        return self._parts

    def _read(self, reader: AnswerReader) -> Iterator[Part]:
        for piece in to_pieces(self._timed_tokens(), self._token_bytes):
            for part in reader.feed(piece):
                self._keep(part)
                yield part
        self._note_time()
        for part in reader.finish(is_cut=self.finish is not Finish.STOP):
            self._keep(part)
            yield part

    def _timed_tokens(self) -> Iterator[int]:
        for token in self._generation:
            self._note_time()
            self.tokens.append(token)
            yield token

    def _note_time(self) -> None:
        self._last = time.perf_counter()
        if not self.tokens:
            self._first = self._last

    def _keep(self, part: Part) -> None:
        if part.is_thought:
            self.thought += part.text
        else:
            self._pieces.append(part.text)
