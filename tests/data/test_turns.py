"""Prompts that the template does not render before an answer: an opened thought, a system message that moves."""

from __future__ import annotations

from typing import Any

import pytest

from edgetune.data.chat import ChatTemplate
from edgetune.data.turns import find_turns

_HEAD = "{%- for m in messages %}{{- '[' + m.role + ']' }}{%- if m.role == 'assistant' %}"
_TAIL = "{{- m.content + '<eos>' }}{%- else %}{{- m.content }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}"
REASONING = "{%- if m.reasoning_content %}{{- '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{%- endif %}"
OPENS = _HEAD + REASONING + _TAIL + "{{- '[assistant]<think>\n' }}{%- endif %}"
CLOSES_ALONE = (
    _HEAD + "{{- '<think>' + m.reasoning_content if m.reasoning_content }}{{- '</think>' }}" + _TAIL
    + "{{- '[assistant]<think>' }}{%- endif %}"
)  # fmt: skip
STRIPS = (
    _HEAD
    + _TAIL.replace("m.content + '<eos>'", "m.content.split('</think>')[-1] + '<eos>'")
    + ("{{- '[assistant]<think>\n' }}{%- endif %}")
)
EMPTY_THOUGHT = _HEAD + _TAIL + "{{- '[assistant]<|channel>thought\n<channel|>' }}{%- endif %}"
OTHER_HEADER = (
    _HEAD + "{{- '<|start_thought|>' + m.thinking + '<|end_thought|>' if m.thinking }}{{- '<|start_text|>' }}" + _TAIL
    + "{{- '[assistant]<|start_thought|>' }}{%- endif %}"
)  # fmt: skip
WITH_WORDS = (
    _HEAD + "{{- m.thinking + '[END]' if m.thinking }}" + _TAIL + "{{- '[assistant]Let me think: ' }}{%- endif %}"
)
MOVING_SYSTEM = (
    "{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}{%- for m in rest %}"
    "{%- if m.role == 'user' %}{{- '[INST]' + (messages[0].content + '\n' if loop.last and "
    "messages[0].role == 'system' else '') + m.content + '[/INST]' }}{%- else %}{{- m.content + '<eos>' }}"
    "{%- endif %}{%- endfor %}"
)


def _turn(source: str, *, system: str | None = None, **answer: Any) -> tuple[str, str, bool]:
    question = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **answer}]
    before = [] if system is None else [{"role": "system", "content": system}]
    (turn,) = find_turns(ChatTemplate(source, None, "<eos>"), [*before, *question])
    return turn.prompt, turn.text, turn.is_completed


@pytest.mark.parametrize(
    ("source", "prompt", "text", "apart"),
    [
        (OPENS, "<think>\n", "\n</think>\n\na<eos>", True),
        (CLOSES_ALONE, "<think>", "</think>a<eos>", True),
        (STRIPS, "<think>\n", "\n</think>\n\na<eos>", True),
        (EMPTY_THOUGHT, "<|channel>thought\n<channel|>", "a<eos>", True),
        (OTHER_HEADER, "<|start_thought|>", "<|end_thought|><|start_text|>a<eos>", True),
        (WITH_WORDS, "Let me think: ", "[END]a<eos>", True),
    ],
)
def test_an_answer_without_reasoning_closes_the_thought_that_its_prompt_opens(
    source: str, prompt: str, text: str, apart: bool
) -> None:
    assert _turn(source) == ("[user]q[assistant]" + prompt, text, apart)


@pytest.mark.parametrize(
    ("source", "answer", "text"),
    [
        (OPENS, {"reasoning_content": "hm"}, "hm\n</think>\n\na<eos>"),
        (CLOSES_ALONE, {"reasoning_content": "hm"}, "hm</think>a<eos>"),
        (STRIPS, {"content": "<think>\nhm\n</think>\n\na"}, "hm\n</think>\n\na<eos>"),
        (OTHER_HEADER, {"thinking": "hm"}, "hm<|end_thought|><|start_text|>a<eos>"),
    ],
)
def test_reasoning_of_a_row_stays_behind_the_opened_thought(source: str, answer: dict[str, str], text: str) -> None:
    assert _turn(source, **answer)[1] == text


def test_a_system_message_that_the_template_drops_before_answers_is_in_the_prompt() -> None:
    assert _turn(MOVING_SYSTEM, system="S.") == ("[INST]S.\nq[/INST]", "a<eos>", False)


def test_several_answers_behind_an_opened_thought_are_turns_of_their_own() -> None:
    messages = [{"role": role, "content": role[0]} for role in ("user", "assistant", "assistant", "assistant")]
    found = find_turns(ChatTemplate(STRIPS, None, "<eos>"), messages)
    assert [(turn.first, turn.last) for turn in found] == [(1, 1), (2, 2), (3, 3)]
    assert [turn.text for turn in found] == ["\n</think>\n\na<eos>", "a<eos>", "a<eos>"]
