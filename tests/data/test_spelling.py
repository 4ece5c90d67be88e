"""Tools, calls and empty contents in every usual spelling, under real templates."""

from __future__ import annotations

from typing import Any

import pytest

from edgetune.data.formats import ChatRow
from edgetune.data.spelling import spell_as_read
from tests.data.conversations import ASK, CLOCK, DIM, LIGHT, assistant, call
from tests.data.test_real_templates import ours

OBJECT = assistant("", tool_calls=[call("set_light", DIM)])
TEXT = assistant("", tool_calls=[call("set_light", '{"room": "bedroom", "level": 30}')])


def _rendered(name: str, answer: dict[str, Any], tools: list[dict[str, Any]] | None = None) -> str:
    row = spell_as_read(ours(name), ChatRow([ASK, answer], tools or [LIGHT]))
    return ours(name).render(row.messages, tools=row.tools)


@pytest.mark.parametrize("name", ["GLM-4.6", "Qwen3-Coder", "MiniMax-M2", "deepseek-ai-DeepSeek-V4", "muse-glimmer"])
def test_arguments_as_text_reach_a_template_that_needs_objects(name: str) -> None:
    assert _rendered(name, TEXT) == ours(name).render([ASK, OBJECT], tools=[LIGHT])


def test_arguments_as_objects_reach_a_template_that_needs_text() -> None:
    name = "meetkai-functionary-medium-v3.2"
    assert _rendered(name, OBJECT) == ours(name).render([ASK, TEXT], tools=[LIGHT])


def test_arguments_do_not_become_text_within_json() -> None:
    name = "Qwen-Qwen2.5-7B-Instruct"
    assert '"arguments": "{' in ours(name).render([ASK, TEXT], tools=[LIGHT])
    assert _rendered(name, TEXT) == ours(name).render([ASK, OBJECT], tools=[LIGHT])


@pytest.mark.parametrize(
    "answer", [{**OBJECT, "content": None}, {"role": "assistant", "tool_calls": OBJECT["tool_calls"]}]
)
@pytest.mark.parametrize(
    "name", ["Qwen-Qwen3-0.6B", "GLM-4.6", "openai-gpt-oss-120b", "unsloth-mistral-Devstral-Small-2507"]
)
def test_a_call_without_a_content_has_an_empty_one(name: str, answer: dict[str, Any]) -> None:
    assert _rendered(name, answer) == ours(name).render([ASK, OBJECT], tools=[LIGHT])


@pytest.mark.parametrize("name", ["Apertus-8B-Instruct", "openai-gpt-oss-120b", "MiniMax-M2", "google-gemma-4-31B-it"])
def test_a_tool_without_its_wrapper_gets_it_where_the_template_needs_it(name: str) -> None:
    tools: Any = [LIGHT["function"], CLOCK]
    assert _rendered(name, OBJECT, tools) == ours(name).render([ASK, OBJECT], tools=[LIGHT, CLOCK])


def test_a_row_that_is_read_stays_as_it_is() -> None:
    row = ChatRow([ASK, OBJECT], [LIGHT])
    assert spell_as_read(ours("moonshotai-Kimi-K2"), row) is row
