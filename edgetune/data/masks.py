"""From a conversation to token ids, and which of them are trained on.

Stock templates do not mark the assistant's turns, so a mask must not depend on `{% generation %}`. The turns are the
difference of rendered prefixes of the conversation (turns.py). The law of the tokens is:

- The ids of a row begin with the ids of its prompt, tokenized as it is when the model is asked. For a conversation of
  several turns this holds for the prompt of each turn that is trained on.
- Everything behind the prompt is trained on, up to the stop token of the turn. Text behind the stop token, often a line
  end, is not: generation has ended there.

Usually one tokenization of the whole text has this property. Where a token of it lies across the beginning of an
answer, the answer is tokenized apart from the prompt (continuation.py). Where no single row has the property, because
the template rewrites earlier turns or because the next prompt merges such an answer with what precedes it, there is one
row for each turn.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from edgetune.data.chat import ChatTemplate
from edgetune.data.continuation import continue_ids
from edgetune.data.messages import Conversation
from edgetune.data.text_tokenizer import Offset, TextTokenizer
from edgetune.data.turns import HistoryRewriteError, RenderedTurn, Tools, check_beginning, close_turn, find_turns
from edgetune.errors import DataError

__all__ = ["EncodedConversation", "EncodedRow", "HistoryRewriteError", "encode_answer", "encode_conversation"]

_TAGS = re.compile(r"\s*<[^<>\s]+>(?:<[^<>\s]+>|\w{1,12}|\s)*")  # <|start_header_id|>assistant<|end_header_id|>
TEMPLATE_HINT = "Use a template that writes eos_token after the assistant's turns (data.chat_template: chatml)"


class _TokenBorderError(Exception):
    """The ids of the rows so far are not the beginning of the ids of a turn's prompt."""


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
        return self if len(self.input_ids) <= length else EncodedRow(self.input_ids[:length], self.supervised[:length])


@dataclass(frozen=True)
class EncodedConversation:
    """The rows of a conversation."""

    rows: list[EncodedRow]
    """One, or one for each turn."""
    split_reason: str | None = None
    """Why there is one for each turn, in words."""
    completed: int = 0
    """Number of turns whose prompt opens a thought that is ended in the answer, since the template renders none."""


def encode_conversation(
    template: ChatTemplate,
    tokenizer: TextTokenizer,
    conversation: Conversation,
    *,
    tools: Tools = None,
    untrained: Collection[int] = (),
    following: Conversation | None = None,
) -> EncodedConversation:
    """Render and tokenize a conversation, and mark the tokens that are trained on.

    Args:
        template: The chat template.
        tokenizer: The tokenizer.
        conversation: The messages.
        tools: JSON schemas of the tools that the template describes.
        untrained: Indices of assistant messages that are context only.
        following: Messages behind the conversation that are left out. Their marker may end the last turn.

    Raises:
        DataError: If a turn does not end with a stop token.
        HistoryRewriteError: If the template renders a turn without the prompt that the model is given for it.
    """
    found = find_turns(template, conversation, tools, untrained)
    is_last = bool(found) and found[-1].last == len(conversation) - 1
    whole = found[-1].answered if is_last else template.render(conversation, tools=tools)
    all_messages = [*conversation, *(following or ())]
    turns = [_end_with_stop(template, tokenizer, all_messages, tools, turn) for turn in found]
    if not turns:
        ids = tokenizer.encode(whole)[0]
        return EncodedConversation([EncodedRow(ids, [False] * len(ids))])
    if is_last:
        whole = turns[-1].answered  # with the next role's marker
    completed = sum(turn.is_completed for turn in turns)
    try:
        return EncodedConversation([_encode_together(tokenizer, whole, turns)], completed=completed)
    except HistoryRewriteError as error:
        reason = error.message
    except _TokenBorderError as error:
        reason = str(error)
    rows = [_encode_apart(tokenizer, [turn]) for turn in turns]
    return EncodedConversation(rows, reason if len(turns) > 1 else None, completed)


def encode_answer(
    template: ChatTemplate, tokenizer: TextTokenizer, conversation: Conversation, *, tools: Tools = None
) -> EncodedRow:
    """Encode a conversation with its last message, an assistant's, as the only turn that is trained on."""
    others = range(len(conversation) - 1)
    turns = find_turns(template, conversation, tools, others)
    return _encode_apart(tokenizer, [_end_with_stop(template, tokenizer, conversation, tools, turns[-1])])


def _end_with_stop(
    template: ChatTemplate, tokenizer: TextTokenizer, conversation: Conversation, tools: Tools, turn: RenderedTurn
) -> RenderedTurn:
    """Return the turn, with the next role's marker if that is its stop token."""
    if turn.text.rstrip().endswith(tokenizer.stop_texts):
        return turn
    ids = tokenizer.encode_part(turn.text)
    kept = _count_up_to_stop(tokenizer, ids)
    if kept and ids[kept - 1] in tokenizer.stop_ids:
        return turn
    return close_turn(template, tokenizer, conversation, tools, turn) or turn


def _count_up_to_stop(tokenizer: TextTokenizer, ids: Sequence[int]) -> int:
    """Count the tokens of a turn up to its stop token, the last one that is declared or else the last special token.

    Return 0 if more than white space follows. Behind a declared stop token other tags may follow: some templates open
    the next turn whether one is asked for or not.
    """
    kept = len(ids)
    while kept and ids[kept - 1] not in tokenizer.ending_ids:
        kept -= 1
    declared = kept  # stop tokens are ending tokens
    while declared and ids[declared - 1] not in tokenizer.stop_ids:
        declared -= 1
    if declared == len(ids):
        return declared
    behind = tokenizer.decode(ids[declared:])
    if declared and _TAGS.fullmatch(behind):
        return declared
    if declared < kept:
        behind = tokenizer.decode(ids[kept:])
    return 0 if behind.strip() else kept


def _encode_together(tokenizer: TextTokenizer, whole: str, turns: Sequence[RenderedTurn]) -> EncodedRow:
    """Return one row with all turns. Raises HistoryRewriteError or _TokenBorderError if there is no such row."""
    for turn in turns:
        check_beginning(turn.prompt, whole, f"the prompt before message {turn.last + 1}")
        check_beginning(turn.answered, whole, f"the conversation up to message {turn.last + 1}")
    ids, offsets = tokenizer.encode(whole)
    supervised = [False] * len(ids)
    for turn in turns:
        start = tokenizer.count_prompt_tokens(ids, offsets, turn.prompt)
        if start is None:
            return _encode_apart(tokenizer, turns)
        end = bisect_left(offsets, len(turn.answered), lo=start, key=lambda offset: offset[0])
        if end > start and _begins_behind(whole, offsets[end - 1], len(turn.answered)):
            end -= 1
        _mark(tokenizer, turn, ids[start:end], supervised, start)
    return EncodedRow(ids, supervised)


def _begins_behind(whole: str, offset: Offset, end: int) -> bool:
    """Whether a token that starts before `end` has only white space there: a marker takes the space before it."""
    start, stop = offset
    return stop > end and not whole[start:end].strip()


def _encode_apart(tokenizer: TextTokenizer, turns: Sequence[RenderedTurn]) -> EncodedRow:
    """Return one row whose answers are tokenized apart from their prompts."""
    ids: list[int] = []
    supervised: list[bool] = []
    kept = 0
    for turn in turns:
        given = tokenizer.encode(turn.prompt)[0]
        if given[:kept] != ids[:kept]:
            raise _TokenBorderError(
                f"the tokens of the prompt before message {turn.last + 1} are not those of the row up to there: an "
                "earlier answer begins or ends inside a token"
            )
        answer = continue_ids(
            lambda text: tokenizer.encode(text)[0], tokenizer.decode, turn.prompt, given, turn.text,
            tokenizer.stop_texts,
        )  # fmt: skip
        ids = [*given, *answer]
        supervised = [*supervised[:kept], *[False] * (len(ids) - kept)]
        kept = len(given) + _mark(tokenizer, turn, answer, supervised, len(given))
    return EncodedRow(ids, supervised)


def _mark(
    tokenizer: TextTokenizer, turn: RenderedTurn, answer: Sequence[int], supervised: list[bool], start: int
) -> int:
    """Mark the tokens of an answer, which begins at `start`, up to its stop token; return their number.

    Raises DataError if it has no stop token.
    """
    kept = _count_up_to_stop(tokenizer, answer)
    if not kept:
        raise DataError(
            "the chat template ends the assistant's turn without a stop token, so the model would never learn to stop: "
            f"it ends with {turn.text[-40:]!r}",
            TEMPLATE_HINT,
        )
    for position in range(max(1, start), start + kept):  # nothing predicts the first token of a row
        supervised[position] = True
    return kept
