"""What a chat template writes around an answer, and how a generated answer is told from it.

Training teaches a model to write what its template writes: an empty thought, the header of a channel, words or spaces
around the content. None of it is a part of the answer. It is found by rendering the conversation with contents and
reasoning that are known, so no template needs to be known.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from edgetune.data.chat import ChatTemplate, Message
from edgetune.data.thoughts import continue_prompt
from edgetune.errors import DataError
from edgetune_converters.chat_template import REASONING_KEYS

_CONTENTS = ("answer4e1f83", "Probe9c07d5")
_THOUGHT = "thought5b2a61"
_TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_EMPTY_PAIR = re.compile(r"\s*([<\[])([\w|]+)([>\]])\s*\1/\2\3\s*")


@dataclass(frozen=True)
class AnswerFrame:
    """The text around the content of an answer, with special tokens as text. All of it may be empty."""

    prefix: str = ""
    """From the end of the prompt to the content, in an answer without reasoning."""
    suffix: str = ""
    """From the content to the stop token."""
    opening: str = ""
    """From the end of the prompt to the reasoning."""
    closing: str = ""
    """From the reasoning to the content; empty if the template knows no reasoning."""
    is_opened: bool = False
    """Whether the prompt itself opens the reasoning."""

    @property
    def given(self) -> str:
        """The part of the prefix that ends where the first token of the content begins, which may hold a space."""
        return self.prefix.rstrip(" ")

    @property
    def mark(self) -> tuple[str, str]:
        """The tag that ends reasoning, and what follows it before the content."""
        tag = _TAG.search(self.closing)
        core = tag.group() if tag else self.closing.strip() or self.closing
        return core, self.closing.partition(core)[2] if core else ""


NO_FRAME = AnswerFrame()
"""The frame of plain text."""


def find_frame(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    stops: Collection[str] = (),
) -> AnswerFrame:
    """Find what the template writes around the answer to a conversation.

    Args:
        template: The chat template.
        messages: The conversation up to where the answer begins.
        tools: JSON schemas of the tools.
        stops: Texts of the stop tokens, at which generation ends.
    """
    try:
        prompt = template.render(messages, add_generation_prompt=True, tools=tools)
    except DataError:
        return NO_FRAME
    found = [_around(template, messages, tools, prompt, content) for content in _CONTENTS]
    prefix, suffix = found[0] if found[0] is not None and found[0] == found[1] else ("", "")
    suffix = suffix[: min((at for stop in stops if stop and (at := suffix.find(stop)) >= 0), default=len(suffix))]
    opening, closing = _reasoning(template, messages, tools, prompt) or _known_tags(template, prefix, prompt)
    is_opened = bool(closing) and not opening.strip()
    return AnswerFrame(prefix, suffix, opening, closing, is_opened)


def _around(
    template: ChatTemplate, messages: Sequence[Message], tools: Any, prompt: str, content: str
) -> tuple[str, str] | None:
    turn = _turn(template, messages, tools, prompt, {"content": content})
    if turn is None or turn.count(content) != 1:
        return None
    before, _, after = turn.partition(content)
    return before, after


def _turn(
    template: ChatTemplate, messages: Sequence[Message], tools: Any, prompt: str, keys: Mapping[str, str]
) -> str | None:
    """Return the text behind the prompt for an answer; None if the prompt does not precede it."""
    try:
        text = template.render([*messages, {"role": "assistant", **keys}], tools=tools)
    except DataError:
        return None
    return text[len(prompt) :] if text.startswith(prompt) else continue_prompt(prompt, text, keys)


def _reasoning(template: ChatTemplate, messages: Sequence[Message], tools: Any, prompt: str) -> tuple[str, str] | None:
    """Return what the template writes before and behind reasoning; None if it renders none."""
    content = _CONTENTS[0]
    for key in REASONING_KEYS:
        turn = _turn(template, messages, tools, prompt, {key: _THOUGHT, "content": content})
        if turn is None or turn.count(_THOUGHT) != 1 or turn.count(content) != 1:
            continue
        opening, _, rest = turn.partition(_THOUGHT)
        closing, found, _ = rest.partition(content)
        if found and closing and (opening.strip() or _ends_with_tag(prompt)):
            return opening, closing
    return None


def _ends_with_tag(prompt: str) -> bool:
    return bool(re.search(rf"(?:{_TAG.pattern})\s*$", prompt))


def _known_tags(template: ChatTemplate, prefix: str, prompt: str) -> tuple[str, str]:
    """Return opening and closing of reasoning from an empty thought in the prefix, or from the template's text."""
    pair = _EMPTY_PAIR.fullmatch(prefix)
    if pair is None and "</think>" not in template.source:
        return "", ""
    left, name, right = pair.groups() if pair else ("<", "think", ">")
    opening, closing = f"{left}{name}{right}", f"{left}/{name}{right}"
    after = prefix.partition(closing)[2] if pair else "\n\n"
    return "" if prompt.rstrip().endswith(opening) else opening, closing + after


class TextPiece(NamedTuple):
    """A part of a generated text."""

    text: str
    is_special: bool = False
    """Whether it is a special token, which is no text of an answer."""


class Part(NamedTuple):
    """A part of a generated text without what the template writes."""

    text: str
    is_thought: bool


class AnswerReader:
    """Separates an answer from its frame while it is generated."""

    def __init__(self, frame: AnswerFrame) -> None:
        self._frame = frame
        self._core, self._rest = frame.mark
        self._opening = frame.opening.strip()
        self._pending: list[TextPiece] = []
        self._thought: list[str] = []
        self._step = self._begin

    def feed(self, piece: TextPiece) -> Iterator[Part]:
        """Yield what is certain after another piece of the text."""
        if piece.text:
            self._pending.append(piece)
            yield from self._advance()

    def finish(self, *, is_cut: bool = False) -> Iterator[Part]:
        """Yield what is left at the end. `is_cut`: the text did not end by itself.

        A text that should have begun within reasoning and never leaves it is the answer, unless it was cut.
        """
        if self._step == self._think:
            yield from self._emit(len(self._text), is_thought=True)
            if self._frame.is_opened and not is_cut:
                yield Part("".join(self._thought), is_thought=False)
        elif self._step == self._skip and self._rest.startswith(self._text):
            pass
        elif self._step != self._answer or self._text != self._frame.suffix:
            yield from self._emit(len(self._text), is_thought=False)

    @property
    def _text(self) -> str:
        return "".join(piece.text for piece in self._pending)

    def _advance(self) -> Iterator[Part]:
        step = None
        while step != self._step:
            step = self._step
            yield from step(self._text)

    def _begin(self, text: str) -> Iterator[Part]:
        """Decide whether the text begins with the prefix, with reasoning, or with the answer."""
        prefix, opening = self._frame.prefix, self._opening
        if prefix and text.startswith(prefix):
            self._take(len(prefix))
            self._step = self._answer
        elif text and prefix.startswith(text):
            pass
        elif opening and text.lstrip().startswith(opening):
            self._take(text.index(opening) + len(opening))
            self._step = self._think
        elif opening and opening.startswith(text.lstrip()):
            pass
        else:
            self._step = self._think if self._frame.is_opened else self._answer
        yield from ()

    def _think(self, text: str) -> Iterator[Part]:
        end = text.find(self._core)
        if end >= 0:
            yield from self._emit(end, is_thought=True)
            self._take(len(self._core))
            self._step = self._skip
        else:
            yield from self._emit(len(text) - _overlap(text, self._core), is_thought=True)

    def _skip(self, text: str) -> Iterator[Part]:
        """Leave out what the template writes between the end of the reasoning and the content."""
        if text.startswith(self._rest) or not self._rest.startswith(text):
            shared = next(n for n in range(len(self._rest), -1, -1) if text.startswith(self._rest[:n]))
            if shared == len(self._rest) or not text[:shared].strip():
                self._take(shared)
            self._step = self._answer
        yield from ()

    def _answer(self, text: str) -> Iterator[Part]:
        yield from self._emit(len(text) - _overlap(text, self._frame.suffix), is_thought=False)

    def _emit(self, length: int, *, is_thought: bool) -> Iterator[Part]:
        taken = self._take(length)
        if taken and is_thought:
            self._thought.append(taken)
        if taken:
            yield Part(taken, is_thought)

    def _take(self, length: int) -> str:
        """Remove `length` characters from what is pending, and return them without special tokens."""
        taken = []
        while length > 0:
            text, is_special = self._pending.pop(0)
            if len(text) > length:
                self._pending.insert(0, TextPiece(text[length:], is_special))
            if not is_special:
                taken.append(text[:length])
            length -= len(text)
        return "".join(taken)


def _overlap(text: str, mark: str) -> int:
    """Return the length of the longest end of the text with which the mark begins."""
    return next((n for n in range(min(len(text), len(mark)), 0, -1) if text.endswith(mark[:n])), 0)


def read_answer(frame: AnswerFrame, pieces: Iterable[TextPiece], *, is_cut: bool = False) -> str:
    """Return the answer alone in a generated text, without its stop token."""
    reader = AnswerReader(frame)
    parts = [part for piece in pieces for part in reader.feed(piece)]
    return "".join(part.text for part in [*parts, *reader.finish(is_cut=is_cut)] if not part.is_thought)
