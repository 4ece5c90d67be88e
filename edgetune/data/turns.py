"""The assistant's turns of a conversation as text: what the model is given, and what it must generate.

For the assistant message i the model is given render(messages[:i], add_generation_prompt), and must generate the rest
of render(messages[:i + 1]). Where the second does not begin with the first, the border is found in the second:

- A message that follows another assistant message, or leads the conversation, is given the text up to its own header.
  Templates render an assistant message that is the last one differently, and nobody asks behind it.
- A message that the template joins with the assistant message before it is one turn with it.

A template that closes a turn with nothing leaves that to the marker of the next role (GLM-4). The marker is then the
end of the turn, if it is a declared stop token, since generation ends at it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgetune.data.chat import ChatTemplate
from edgetune.data.messages import Conversation
from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.data.thoughts import answer_with_empty_thought, closes_thought, continue_prompt, spells_tags_of
from edgetune.errors import DataError

Tools = Sequence[Mapping[str, Any]] | None

_PROBES = ("answer", "Probe")  # contents without white space at the border and without a common beginning
_NEXT_ROLES = ("user", "tool")


class HistoryRewriteError(DataError):
    """The template renders a turn differently if later turns follow."""


@dataclass(frozen=True)
class RenderedTurn:
    """An assistant's turn as text."""

    first: int
    """Index of its first message; the template may join several."""
    last: int
    """Index of its last message."""
    prompt: str
    """The rendered text that the model is given."""
    text: str
    """What follows the prompt: the answer, its stop token, and what the template writes behind it."""
    is_completed: bool = False
    """Whether the thought that the prompt opens is ended here, since the template renders none (thoughts.py)."""

    @property
    def answered(self) -> str:
        """The conversation up to the end of the turn."""
        return self.prompt + self.text


def find_turns(
    template: ChatTemplate, conversation: Conversation, tools: Tools = None, untrained: Collection[int] = ()
) -> list[RenderedTurn]:
    """Return the assistant's turns that are trained on, in order.

    Args:
        template: The chat template.
        conversation: The messages.
        tools: JSON schemas of the tools that the template describes.
        untrained: Indices of assistant messages that are context only.

    Raises:
        DataError: If the template refuses the conversation up to one of them.
        HistoryRewriteError: If the text that the model is given for a turn is not in the rendering of that turn.
    """
    turns: list[RenderedTurn] = []
    for index, message in enumerate(conversation):
        if message["role"] != "assistant" or index in untrained:
            continue
        turn = _find_turn(template, conversation[: index + 1], tools, turns[-1] if turns else None)
        if turns and turn.first == turns[-1].first:
            turns.pop()
        turns.append(turn)
    return turns


def _find_turn(
    template: ChatTemplate, conversation: Conversation, tools: Tools, before: RenderedTurn | None
) -> RenderedTurn:
    """Return the turn of the last message; it may extend `before`, the trained turn before it."""
    index = len(conversation) - 1
    answered = template.render(conversation, tools=tools)
    follows = index > 0 and conversation[index - 1]["role"] == "assistant"
    try:
        prompt = template.render(conversation[:index], add_generation_prompt=True, tools=tools)
    except DataError:
        if index and not follows:
            raise
        prompt = None  # most templates refuse a conversation of no messages
    if prompt is not None and answered.startswith(prompt):
        return RenderedTurn(index, index, prompt, answered[len(prompt) :])
    first = index
    found = _text_up_to_header(template, conversation, tools) if follows or not index else None
    if found is None and follows:
        if before is not None and before.last == index - 1 and _is_joined(before, answered):
            first, found = before.first, before.prompt
        else:
            found = _text_up_to_content(template, conversation, tools)
    if found is not None and answered.startswith(found):
        return RenderedTurn(first, index, found, answered[len(found) :])
    if prompt is None:
        raise DataError(
            "the chat template renders no prompt for an assistant message that leads the conversation",
            'Remove the message, or exclude it from the loss: "train": false',
        )
    rest = _text_behind_last_question(template, conversation, tools, prompt, answered)
    if rest is not None:
        return RenderedTurn(index, index, prompt, rest)
    rest = continue_prompt(prompt, answered, conversation[-1])
    if rest is None or not spells_tags_of(template, rest):
        rest = answer_with_empty_thought(template, conversation, tools, prompt, answered) or rest
    if rest is not None:
        return RenderedTurn(index, index, prompt, rest, is_completed=True)
    if closes_thought(prompt, answered):
        known = ", ".join(template.option_names)
        raise HistoryRewriteError(
            f"message {index + 1} has reasoning, and the prompt of the chat template has already ended it: "
            f"{prompt[-30:]!r}",
            f"Switch it on with template.options (the template reads {known}), or remove the reasoning",
        )
    raise _rewrite_error(prompt, answered, f"the prompt before message {index + 1}", f"that up to message {index + 1}")


def _is_joined(before: RenderedTurn, answered: str) -> bool:
    """Whether the next message goes on where the turn before it would otherwise be closed."""
    return answered.startswith(before.prompt) and not answered.startswith(before.answered.rstrip())


def _text_behind_last_question(
    template: ChatTemplate, conversation: Conversation, tools: Tools, prompt: str, answered: str
) -> str | None:
    """Return an answer whose prompt is rendered differently only before the last question, or None.

    Mistral's templates put the system message before the last question, but only if nothing follows that.
    """
    if len(conversation) < 2:
        return None
    question, answer = conversation[-2].get("content"), conversation[-1]
    if not isinstance(question, str) or not question.strip() or not answer.get("content") or answer.get("tool_calls"):
        return None
    at = prompt.rfind(question.strip())
    given = _text_up_to_content(template, conversation, tools)
    return answered[len(given) :] if at >= 0 and given.endswith(prompt[at:]) else None


def _text_up_to_header(template: ChatTemplate, conversation: Conversation, tools: Tools) -> str | None:
    """Return the text up to the end of the last message's own header; None if the template writes none."""
    index = len(conversation) - 1
    asked = max((i + 1 for i, message in enumerate(conversation) if message["role"] != "assistant"), default=0)
    before = conversation[:asked] or [{"role": "user", "content": _PROBES[0]}]
    closed = template.render(before, tools=tools)
    opened = template.render(before, add_generation_prompt=True, tools=tools)
    header = opened[_common_length(closed, opened) :]  # or the end of it, where something else closes a text
    given = _text_up_to_content(template, conversation, tools)
    if not header:
        return None if index else given
    count = template.render(conversation[:index], tools=tools).count(header) if index else 0
    return given[: given.rindex(header) + len(header)] if given.count(header) == count + 1 else None


def _text_up_to_content(template: ChatTemplate, conversation: Conversation, tools: Tools) -> str:
    """Return the text before the content of the last message, an assistant's."""
    variants = [[*conversation[:-1], {"role": "assistant", "content": text}] for text in _PROBES]
    one, other = (template.render(variant, tools=tools) for variant in variants)
    return one[: _common_length(one, other)]


def close_turn(
    template: ChatTemplate, tokenizer: TextTokenizer, conversation: Conversation, tools: Tools, turn: RenderedTurn
) -> RenderedTurn | None:
    """Return a turn with the marker of the next role behind it; None if no declared stop token follows there.

    Args:
        template: The chat template.
        tokenizer: The tokenizer, with the declared stop tokens.
        conversation: The whole conversation, whose next message is preferred.
        tools: JSON schemas of the tools.
        turn: A turn of the conversation.
    """
    upto = conversation[: turn.last + 1]
    following = conversation[turn.last + 1 : turn.last + 2]
    answered = template.render(upto, tools=tools) if turn.is_completed else turn.answered
    roles = reversed(_NEXT_ROLES) if upto[-1].get("tool_calls") else _NEXT_ROLES
    candidates = [message for message in following if message["role"] != "assistant"]
    candidates += [{"role": role, "content": _PROBES[0]} for role in roles]
    for message in candidates:
        rest = _text_after(template, upto, message, tools, answered)
        marker = None if rest is None else _leading_stop(tokenizer, rest)
        if marker is not None:
            return replace(turn, text=turn.text + marker)
    return None


def _text_after(
    template: ChatTemplate, upto: Conversation, message: Mapping[str, Any], tools: Tools, answered: str
) -> str | None:
    """Return what the template writes behind the last message of `upto` if another message follows."""
    try:
        longer = template.render([*upto, dict(message)], tools=tools)
        if longer.startswith(answered):
            return longer[len(answered) :]
        if upto[-1].get("tool_calls"):
            return None
        # a template that drops the reasoning of earlier turns: look behind another content
        probe = [*upto[:-1], {"role": "assistant", "content": _PROBES[1]}]
        closed = template.render(probe, tools=tools).rpartition(_PROBES[1])[2]
        rest = template.render([*probe, dict(message)], tools=tools).rpartition(_PROBES[1])[2]
    except DataError:
        return None
    return rest[len(closed) :] if rest.startswith(closed) else None


def _leading_stop(tokenizer: TextTokenizer, text: str) -> str | None:
    """Return a text up to its first token, if that is a declared stop token; white space may precede it."""
    ids, offsets = tokenizer.encode(text)
    for id_, (start, end) in zip(ids, offsets, strict=True):
        if start >= 0 and text[:end].strip():
            return text[:end] if id_ in tokenizer.stop_ids and not text[:start].strip() else None
    return None


def check_beginning(part: str, whole: str, what: str) -> None:
    """Raise HistoryRewriteError if `whole`, a rendered conversation, does not begin with `part`."""
    if not whole.startswith(part):
        raise _rewrite_error(part, whole, what, "the whole")


def _rewrite_error(part: str, whole: str, what: str, than: str) -> HistoryRewriteError:
    at = _common_length(part, whole)
    return HistoryRewriteError(
        f"the chat template rewrites history: {what} has {part[at : at + 30]!r} where {than} has "
        f"{whole[at : at + 30]!r} (after {whole[max(0, at - 20) : at]!r})",
        "Use a template that only appends (data.chat_template), or rows with one assistant turn",
    )


def _common_length(one: str, other: str) -> int:
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low
