"""The templates that llama.cpp's source distribution ships, on fifty kinds of conversations.

The oracle is transformers. libllama does not expose the Jinja engine of llama.cpp: `llama_chat_apply_template` knows a
list of templates and renders them without Jinja, so it is no oracle here.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from edgetune.data.chat import ChatTemplate
from edgetune.errors import DataError
from edgetune_converters import chat_template
from edgetune_converters.tokenizers.soft_tokens import prefixed_template
from tests.data.conversations import CONVERSATIONS

TEMPLATES = {
    file.stem: file.read_text(encoding="utf-8")
    for file in sorted((Path(__file__).parent / "llama_cpp_templates").glob("*.jinja"))
}
OPTIONS: dict[str, dict[str, Any]] = {
    "fireworks-ai-llama-3-firefunction-v2": {"functions": "[]", "datetime": "2026-03-04"},
}
"""Options without which a template renders nothing."""
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


class Stopped(datetime):
    """A clock that stands still, for transformers' `strftime_now`."""

    @classmethod
    def now(cls, tz: Any = None) -> Stopped:
        return cls(2026, 3, 4, 5, 6, 7)


MOMENT = Stopped.now()


@pytest.fixture
def utils(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = pytest.importorskip("transformers.utils.chat_template_utils")
    monkeypatch.setattr(module, "datetime", Stopped)
    return module


def ours(name: str) -> ChatTemplate:
    others = {"pad_token": "<pad>"}
    return ChatTemplate(TEMPLATES[name], "<s>", "</s>", others, OPTIONS.get(name, {})).at(MOMENT)


def theirs(utils: Any, name: str, messages: Any, tools: Any, prompt: bool = False) -> str | None:
    """Return transformers' text; None if it refuses the conversation."""
    try:
        (text,), _ = utils.render_jinja_template(
            [messages], tools=tools, chat_template=TEMPLATES[name], add_generation_prompt=prompt, **TOKENS,
            **OPTIONS.get(name, {}),
        )  # fmt: skip
    except Exception:  # noqa: BLE001 - templates raise all kinds of errors
        return None
    return str(text)


def mine(template: ChatTemplate, messages: Any, tools: Any, prompt: bool = False) -> str | None:
    try:
        return template.render(messages, tools=tools, add_generation_prompt=prompt)
    except DataError:
        return None


def test_there_are_many_templates_and_kinds_of_conversations() -> None:
    assert len(TEMPLATES) == 70
    assert len(CONVERSATIONS) >= 50


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_real_template_renders_as_in_transformers(utils: Any, name: str) -> None:
    template = ours(name)
    rendered = 0
    for messages, tools in CONVERSATIONS.values():
        prompts = (False,) if messages and messages[-1]["role"] == "assistant" else (False, True)
        for prompt in prompts:
            expected = theirs(utils, name, messages, tools, prompt)
            assert mine(template, messages, tools, prompt) == expected
            rendered += expected is not None
    assert rendered > 0


def assert_prefixed(name: str, begins: str, conversations: Sequence[tuple[Any, Any]]) -> None:
    source, soft = begins + TEMPLATES[name], "<|soft_0|><|soft_1|>"
    plain, prefixed = (
        ChatTemplate(text, "<s>", "</s>", {"pad_token": "<pad>"}, OPTIONS.get(name, {})).at(MOMENT)
        for text in (source, prefixed_template(source, soft))
    )
    rendered = 0
    for messages, tools in conversations:
        expected = mine(plain, messages, tools, True)
        assert mine(prefixed, messages, tools, True) == (None if expected is None else soft + expected)
        rendered += expected is not None
    assert rendered > 0


@pytest.mark.parametrize("name", TEMPLATES)
def test_soft_tokens_come_before_all_that_a_real_template_writes(name: str) -> None:
    assert_prefixed(name, "", list(CONVERSATIONS.values()))


@pytest.mark.parametrize("begins", ["  ", " \t {# a comment #}", "{{- '' -}} \n", "\n  "])
@pytest.mark.parametrize(
    "name", ["google-gemma-2-2b-it", "google-gemma-4-31B-it", "CohereForAI-c4ai-command-r7b-12-2024-tool_use"]
)
def test_blanks_that_jinja_strips_are_stripped_behind_soft_tokens(name: str, begins: str) -> None:
    assert_prefixed(name, begins, list(CONVERSATIONS.values())[:5])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Qwen-Qwen3-0.6B", ("enable_thinking",)),
        ("GLM-4.6", ("enable_thinking",)),
        ("deepseek-ai-DeepSeek-V3.1", ("enable_thinking", "thinking")),
        ("openai-gpt-oss-120b", ("builtin_tools", "model_identity", "reasoning_effort")),
        ("meta-llama-Llama-3.2-3B-Instruct", ("custom_tools", "date_string", "tools_in_user_message")),
        ("Qwen-Qwen2.5-7B-Instruct", ()),
    ],
)
def test_the_options_of_real_templates_are_found(name: str, options: tuple[str, ...]) -> None:
    assert chat_template.option_names(TEMPLATES[name]) == options
