"""Prompts that open reasoning, or hold an empty thought, where the rendered answer has none.

Templates of models that think end the prompt with `<think>`, or with a whole empty thought, and leave thoughts out of
the conversation (DeepSeek-R1, QwQ, Nemotron, GLM-4.7, Gemma 4). The rendering of an answer then does not begin with its
prompt. A model is asked with the prompt, so it must be trained behind it: it writes the rest of the thought, the end of
the thought, and then the answer as rendered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from edgetune.data.chat import ChatTemplate
from edgetune.data.messages import Conversation
from edgetune.errors import DataError
from edgetune_converters.chat_template import REASONING_KEYS

_PROBE = "thought7d40c2"
_TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_NAMES = re.compile(r"think|thought|reason|analysis", re.IGNORECASE)
_CLOSED = re.compile(rf"\s*(?P<first>{_TAG.pattern})\s*[\w\s]{{0,16}}(?P<last>{_TAG.pattern})\s*")
_OPEN = re.compile(rf"\s*(?P<tag>{_TAG.pattern})\s*")


def opens_thought(prompt: str) -> bool:
    """Whether a prompt ends with the beginning of reasoning."""
    found = re.search(rf"({_TAG.pattern})\s*$", prompt)
    return found is not None and _is_opening(found[1])


def closes_thought(prompt: str, answered: str) -> bool:
    """Whether the prompt has ended the reasoning, so that there is no place for that of the answer."""
    rest = prompt[_border(prompt, answered) :].strip()
    is_closing = bool(_TAG.fullmatch(rest)) and bool(_NAMES.search(rest)) and not _is_opening(rest)
    return is_closing or (bool(_CLOSED.fullmatch(rest)) and bool(_NAMES.search(rest)))


def continue_prompt(prompt: str, answered: str, message: Mapping[str, Any]) -> str | None:
    """Return the text of an answer behind a prompt with which its rendering does not begin.

    Args:
        prompt: The rendered conversation up to where the answer begins.
        answered: The rendered conversation with the answer.
        message: The answer. Reasoning that the template leaves out is put into the thought that the prompt opens.

    Returns:
        None, if the prompt does not end with a thought.
    """
    border = _border(prompt, answered)
    thought, rest = prompt[border:], answered[border:]
    closed = _CLOSED.fullmatch(thought)
    if closed and _NAMES.search(thought):
        inside = _thought_in_content(message, closed["first"], _closing(closed["first"]))
        return rest.removeprefix(closed["last"]) if inside in rest else None
    opened = _OPEN.fullmatch(thought)
    if opened is None or not _is_opening(opened["tag"]):
        return None
    closing = _closing(opened["tag"])
    inner = rest.removeprefix(opened["tag"])
    if inner != rest or inner.startswith(closing):  # the rendering has a thought, but other white space
        return inner.removeprefix(thought[opened.end("tag") :]) if inner != rest else inner
    line = "\n" if thought.endswith("\n") else ""
    reasoning = next((message[key] for key in REASONING_KEYS if isinstance(message.get(key), str)), "")
    inside = _thought_in_content(message, opened["tag"], closing)
    if inside and inside not in rest:
        reasoning, rest = inside, rest.lstrip("\n")
    text = reasoning.strip("\n")
    return f"{text}{line}{closing}{line * 2}{rest}"


def _border(prompt: str, answered: str) -> int:
    """Return where the two differ, or the beginning of the tag there."""
    shared = min(len(prompt), len(answered))
    at = next((i for i in range(shared) if prompt[i] != answered[i]), shared)
    tags = list(_TAG.finditer(prompt))
    at = next((tag.start() for tag in tags if tag.start() < at < tag.end()), at)
    if not prompt[at:].strip():  # white space behind a tag
        at = next((tag.start() for tag in tags if not prompt[tag.end() : at].strip() and tag.end() <= at), at)
    return at


def _is_opening(tag: str) -> bool:
    return bool(_NAMES.search(tag)) and not tag.startswith(("</", "[/")) and "END" not in tag


def _closing(tag: str) -> str:
    """`<think>` -> `</think>`; `<|START_THINKING|>` -> `<|END_THINKING|>`."""
    return tag.replace("START", "END") if "START" in tag else f"{tag[0]}/{tag[1:]}"


def _thought_in_content(message: Mapping[str, Any], opening: str, closing: str) -> str:
    """Return the reasoning with which a content begins, as models write it."""
    content = message.get("content")
    before, found, _ = content.partition(closing) if isinstance(content, str) else ("", "", "")
    return before.lstrip().removeprefix(opening).strip("\n") if found else ""


def answer_with_empty_thought(
    template: ChatTemplate, conversation: Conversation, tools: Any, prompt: str, answered: str
) -> str | None:
    """Return an answer behind its prompt as the template renders it with reasoning, without the text of that.

    None if the answer has reasoning of its own, or if the template renders none behind the prompt.
    """
    message = conversation[-1]
    if any(message.get(key) for key in REASONING_KEYS) or "think" in str(message.get("content")):
        return None
    border = _border(prompt, answered)
    for key in REASONING_KEYS:
        try:
            text = template.render([*conversation[:-1], {**message, key: _PROBE}], tools=tools)
        except DataError:
            continue
        if text.count(_PROBE) != 1:
            continue
        if text.startswith(prompt):
            return text[len(prompt) :].replace(_PROBE, "")
        if text[border:].startswith(_PROBE) and text[:border] == prompt[:border]:  # the prompt begins it with words
            return text[border:].replace(_PROBE, "")
    return None


def spells_tags_of(template: ChatTemplate, answer: str) -> bool:
    """Whether the template knows the tag that ends the thought of an answer."""
    found = _TAG.search(answer)
    return found is None or found.group() in template.source
