"""The loss mask: the assistant's tokens, found by rendering prefixes of the conversation.

Stock templates do not mark the assistant's turns, so a mask must not depend on `{% generation %}`.

For the assistant's turn i, the model is given render(messages[:i], add_generation_prompt) and must generate the rest of
render(messages[:i + 1]). The characters between the two are the turn. The whole conversation is tokenized once, and a
token belongs to the turn that holds its first character. Therefore:

- A token across the beginning of a turn is not trained on: its first part is given to the model.
- A token across the end of a turn is trained on: it begins as the assistant's text.
- Text after the stop token (often a newline) is not trained on: generation has ended there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.data.chat import ChatTemplate
from edgetune.data.formats import Conversation
from edgetune.data.text_tokenizer import Offset, TextTokenizer
from edgetune.errors import DataError

Span = tuple[int, int]
"""Characters [start, end) of a rendered text."""

TEMPLATE_HINT = "Use a template that writes eos_token after the assistant's turns (data.chat_template: chatml)"


class HistoryRewriteError(DataError):
    """The template renders a turn differently if later turns follow."""


@dataclass(frozen=True)
class EncodedRow:
    """A row for the trainer: token ids, and whether each is trained on."""

    input_ids: list[int]
    supervised: list[bool]

    @property
    def labels(self) -> list[int]:
        """The token ids that are trained on, and -100 elsewhere, as the loss function needs it."""
        return [id_ if trained else -100 for id_, trained in zip(self.input_ids, self.supervised, strict=True)]

    @property
    def endings(self) -> set[int]:
        """The last token of each supervised stretch: the stop token of a turn that was not cut."""
        following = [*self.supervised[1:], False]
        marks = zip(self.input_ids, self.supervised, following, strict=True)
        return {id_ for id_, trained, continues in marks if trained and not continues}

    @property
    def scored(self) -> list[int]:
        """Positions whose token is trained on; never the first, which nothing predicts."""
        return [position for position, trained in enumerate(self.supervised) if trained]

    def cut(self, length: int) -> EncodedRow:
        """Return the first `length` tokens."""
        return EncodedRow(self.input_ids[:length], self.supervised[:length])


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the assistant's turns in it."""

    text: str
    spans: list[Span]


def render_with_spans(
    template: ChatTemplate,
    conversation: Conversation,
    *,
    only_last: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    untrained: Collection[int] = (),
) -> Rendered:
    """Render a conversation and find the assistant's turns in it, or only its last message.

    Args:
        template: The chat template.
        conversation: The messages.
        only_last: Find the last message only.
        tools: JSON schemas of the tools that the template describes.
        untrained: Indices of assistant messages that are context only.

    Raises:
        HistoryRewriteError: If a prefix of the conversation does not render as a prefix of the whole.
    """
    whole = template.render(conversation, tools=tools)
    spans = []
    for index, message in enumerate(conversation):
        if message["role"] != "assistant" or (only_last and index + 1 < len(conversation)):
            continue
        if index in untrained:
            continue
        given = template.render(conversation[:index], add_generation_prompt=True, tools=tools)
        answered = template.render(conversation[: index + 1], tools=tools)
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
        "Use a template that only appends (data.chat_template), or rows with one assistant turn",
    )


def mark_supervised(offsets: Sequence[Offset], spans: Sequence[Span]) -> list[bool]:
    """Return for each token whether a span holds its first character. Both arguments ascend; spans do not overlap."""
    result = []
    remaining = iter(spans)
    span = next(remaining, None)
    for start, _ in offsets:
        while span is not None and start >= span[1]:
            span = next(remaining, None)
        result.append(span is not None and start >= span[0])
    return result


def encode_conversation(
    template: ChatTemplate,
    tokenizer: TextTokenizer,
    conversation: Conversation,
    *,
    only_last: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    untrained: Collection[int] = (),
) -> EncodedRow:
    """Render a conversation, tokenize it once, and mark the tokens that are trained on; see `render_with_spans`.

    Raises:
        DataError: If a turn does not end with a stop token.
        HistoryRewriteError: If the template rewrites earlier turns.
    """
    rendered = render_with_spans(template, conversation, only_last=only_last, tools=tools, untrained=untrained)
    ids, offsets = tokenizer.encode(rendered.text)
    supervised = mark_supervised(offsets, rendered.spans)
    for start, end in rendered.spans:
        turn = [i for i, offset in enumerate(offsets) if start <= offset[0] < end]
        texts = [rendered.text[offsets[i][0] : min(offsets[i][1], end)] for i in turn]
        kept = _count_up_to_stop([ids[i] in tokenizer.ending_ids for i in turn], texts)
        if not kept:
            raise _no_stop_error(rendered.text[start:end])
        for position in turn[kept:]:
            supervised[position] = False
    supervised[:1] = [False]  # nothing predicts the first token
    return EncodedRow(ids, supervised)


def _count_up_to_stop(is_ending: Sequence[bool], texts: Sequence[str]) -> int:
    """Count the tokens up to the last special token of a turn; 0 if more than white space follows it."""
    kept = len(texts)
    while kept and not is_ending[kept - 1]:
        kept -= 1
        if texts[kept].strip():
            return 0
    return kept


def _no_stop_error(turn: str) -> DataError:
    return DataError(
        "the chat template ends the assistant's turn without a stop token, so the model would never learn to stop: "
        f"it ends with {turn[-40:]!r}",
        TEMPLATE_HINT,
    )
