"""Which tokens are trained on: the assistant's, found by rendering prefixes of the conversation (DESIGN 7.3).

For the assistant's turn i, the model is given render(messages[:i], add_generation_prompt) and must write the rest of
render(messages[:i + 1]); the characters between the two are the turn. The whole conversation is tokenized once, and a
token belongs to the turn in which its first character lies. So

- a token that straddles the beginning of a turn is not trained on: the model is given its first part;
- a token that straddles the end of a turn is: it begins as the assistant's text;
- what a template writes after the stop token (often a newline) is not: generation has ended there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgetune.data.chat import ChatTemplate
from edgetune.data.formats import Conversation
from edgetune.data.text_tokenizer import Offset, TextTokenizer
from edgetune.errors import DataError

Span = tuple[int, int]
"""Characters [start, end) of a rendered text."""

TEMPLATE_HINT = "Use a template that writes eos_token after the assistant's turns (data.chat_template: chatml)."


class HistoryRewriteError(DataError):
    """The template renders an earlier turn differently once later ones follow."""


@dataclass(frozen=True)
class EncodedRow:
    """One row as the trainer gets it; `input_ids` and `supervised` are equally long."""

    input_ids: list[int]
    supervised: list[bool]

    @property
    def labels(self) -> list[int]:
        """The ids where they are trained on, -100 elsewhere, as the loss wants it."""
        return [id_ if trained else -100 for id_, trained in zip(self.input_ids, self.supervised, strict=True)]

    @property
    def endings(self) -> set[int]:
        """The last token of each supervised stretch: where a turn was not cut, its stop token."""
        following = [*self.supervised[1:], False]
        marks = zip(self.input_ids, self.supervised, following, strict=True)
        return {id_ for id_, trained, goes_on in marks if trained and not goes_on}

    @property
    def scored(self) -> list[int]:
        """Positions whose token is trained on; never the first, which has none before it."""
        return [position for position, trained in enumerate(self.supervised) if trained]

    def cut(self, length: int) -> EncodedRow:
        """The first `length` tokens."""
        return EncodedRow(self.input_ids[:length], self.supervised[:length])


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and which characters the assistant wrote."""

    text: str
    spans: list[Span]


def render_with_spans(template: ChatTemplate, conversation: Conversation, *, only_last: bool = False) -> Rendered:
    """Render a conversation and find the assistant's turns in it, or only its last message.

    Raises HistoryRewritten when a prefix of the conversation does not render as a prefix of the whole.
    """
    whole = template.render(conversation)
    spans = []
    for index, message in enumerate(conversation):
        if message["role"] != "assistant" or (only_last and index + 1 < len(conversation)):
            continue
        given = template.render(conversation[:index], add_generation_prompt=True)
        answered = template.render(conversation[: index + 1])
        _check_prefix(given, whole, f"the prompt before message {index + 1}")
        _check_prefix(answered, whole, f"the conversation up to message {index + 1}")
        spans.append((min(len(given), len(answered)), len(answered)))
    return Rendered(whole, spans)


def _check_prefix(prefix: str, whole: str, what: str) -> None:
    if whole.startswith(prefix):
        return
    at = next((i for i, (a, b) in enumerate(zip(prefix, whole, strict=False)) if a != b), min(len(prefix), len(whole)))
    raise HistoryRewriteError(
        f"the chat template rewrites history: {what} has {prefix[at : at + 30]!r} where the whole has "
        f"{whole[at : at + 30]!r} (after {whole[max(0, at - 20) : at]!r})",
        "Use a template that only appends (data.chat_template), or rows with one assistant turn.",
    )


def mark_supervised(offsets: Sequence[Offset], spans: Sequence[Span]) -> list[bool]:
    """For each token whether its first character lies in a span. Offsets ascend; spans ascend and do not overlap."""
    result = []
    remaining = iter(spans)
    span = next(remaining, None)
    for start, _ in offsets:
        while span is not None and start >= span[1]:
            span = next(remaining, None)
        result.append(span is not None and start >= span[0])
    return result


def encode_conversation(
    template: ChatTemplate, tokenizer: TextTokenizer, conversation: Conversation, *, only_last: bool = False
) -> EncodedRow:
    """Render, tokenize once and mask; what follows a turn's stop token is not trained on.

    Raises DataError when a turn does not end with a stop token, HistoryRewritten as `render_with_spans` does.
    """
    rendered = render_with_spans(template, conversation, only_last=only_last)
    ids, offsets = tokenizer.encode(rendered.text)
    supervised = mark_supervised(offsets, rendered.spans)
    for start, end in rendered.spans:
        turn = [i for i, offset in enumerate(offsets) if start <= offset[0] < end]
        texts = [rendered.text[offsets[i][0] : min(offsets[i][1], end)] for i in turn]
        kept = _up_to_stop([ids[i] in tokenizer.ending_ids for i in turn], texts)
        if not kept:
            raise _no_stop(rendered.text[start:end])
        for position in turn[kept:]:
            supervised[position] = False
    supervised[:1] = [False]  # nothing predicts the first token
    return EncodedRow(ids, supervised)


def _up_to_stop(is_ending: Sequence[bool], texts: Sequence[str]) -> int:
    """How many tokens of a turn to keep: up to its last special token, which only white space may follow; else 0."""
    kept = len(texts)
    while kept and not is_ending[kept - 1]:
        kept -= 1
        if texts[kept].strip():
            return 0
    return kept


def _no_stop(turn: str) -> DataError:
    return DataError(
        "the chat template ends the assistant's turn without a stop token, so the model would never learn to stop: "
        f"it ends with {turn[-40:]!r}",
        TEMPLATE_HINT,
    )
