"""Several assistant turns in a row: each is trained on once, given the text up to its own header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgetune.errors import DataError
from tests.cases.rendering import pictures
from tests.data import templates

# As Qwen3's: an empty thought in the very last turn only, and reasoning in the turns after the last question.
LAST_TURN_THINKS = (
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{%- for m in messages %}"
    "{{- '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\n' }}{%- if m.role == 'assistant' %}"
    "{%- set thought = m.reasoning_content or '' %}{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}{%- endif %}{{- m.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
JOINS = (
    "{%- for m in messages %}{%- if loop.first or messages[loop.index0 - 1].role != m.role %}"
    "{{- '<|im_start|>' + m.role + '\n' }}{%- else %}{{- '\n\n' }}{%- endif %}{{- m.content }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != m.role %}{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
FIRST_MESSAGE = templates.CHATML.replace("{% for", "{{- '' if messages[0]['role'] == 'system' }}{% for", 1)
EMPTY = "<think>||</think>||"


def _talk(*turns: str) -> dict[str, Any]:
    """Turns are written as `role: content`."""
    pairs = [turn.partition(": ") for turn in turns]
    return {"messages": [{"role": role, "content": content} for role, _, content in pairs]}


def _pictures(folder: Path, row: dict[str, Any], template: str) -> list[str]:
    return [
        text.replace("\n", "|").replace("<|im_end|>", "]").replace("<|im_start|>", "[")
        for text in pictures(folder, [row, _talk("user: q", "assistant: a")], template)[:-1]
    ]


def test_a_turn_that_follows_another_is_given_the_text_up_to_its_header(tmp_path: Path) -> None:
    row = _talk("user: q", "assistant: a1", "assistant: a2", "tool: t1", "tool: t2", "assistant: a3")
    assert _pictures(tmp_path, row, LAST_TURN_THINKS) == [
        f"[user|q]|[assistant|⟦{EMPTY}a1]⟧|",
        f"[user|q]|[assistant|a1]|[assistant|⟦{EMPTY}a2]⟧|",
        f"[user|q]|[assistant|a1]|[assistant|a2]|[user|t1]|[user|t2]|[assistant|⟦{EMPTY}a3]⟧|",
    ]
    assert _pictures(tmp_path, row, templates.CHATML) == [
        "[user|q]|[assistant|⟦a1]⟧|[assistant|⟦a2]⟧|[tool|t1]|[tool|t2]|[assistant|⟦a3]⟧|"
    ]


def test_brackets_are_those_of_transformers(tmp_path: Path) -> None:
    utils: Any = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = _talk("user: q", *(f"assistant: a{i}" for i in range(4)), "user: w", "assistant: b", "assistant: c")
    found = pictures(tmp_path, [messages, _talk("user: q", "assistant: a")], LAST_TURN_THINKS)[:-1]
    answers = [i for i, m in enumerate(messages["messages"]) if m["role"] == "assistant"]
    for picture, index in zip(found, answers, strict=True):
        part = messages["messages"][: index + 1]
        (text,), _ = utils.render_jinja_template([part], chat_template=LAST_TURN_THINKS)
        end = f"<think>\n\n</think>\n\n{part[-1]['content']}<|im_end|>"
        assert picture == text[: text.rindex(end)] + f"⟦{end}⟧\n"


def test_reasoning_in_a_field_keeps_the_turns_in_one_row(tmp_path: Path) -> None:
    row = _talk("user: q", "assistant: a1", "assistant: a2")
    for message in row["messages"][1:]:
        message["reasoning_content"] = "hm"
    assert _pictures(tmp_path, row, LAST_TURN_THINKS) == [
        "[user|q]|[assistant|⟦<think>|hm|</think>||a1]⟧|[assistant|⟦<think>|hm|</think>||a2]⟧|"
    ]


@pytest.mark.parametrize("ending", [[], ["user: more"]])
def test_turns_that_the_template_joins_are_one_turn(tmp_path: Path, ending: list[str]) -> None:
    row = _talk("user: q", "assistant: a1", "assistant: a2", "assistant: a3", "user: w", "assistant: b", *ending)
    whole = "[user|q]|[assistant|⟦a1||a2||a3]⟧|[user|w]|[assistant|⟦b]⟧|"
    assert _pictures(tmp_path, row, JOINS) == [whole]
    row["messages"][1]["train"] = False
    assert _pictures(tmp_path, row, JOINS) == ["[user|q]|[assistant|a1||⟦a2||a3]⟧|[user|w]|[assistant|⟦b]⟧|"]
    row["messages"][1]["train"] = True
    row["messages"][2]["train"] = False
    assert _pictures(tmp_path, row, JOINS) == [
        "[user|q]|[assistant|⟦a1]⟧|",
        "[user|q]|[assistant|a1||a2||⟦a3]⟧|",
        "[user|q]|[assistant|a1||a2||a3]|[user|w]|[assistant|⟦b]⟧|",
    ]


@pytest.mark.parametrize("template", [FIRST_MESSAGE, templates.CHATML, JOINS])
def test_a_leading_assistant_turn_is_trained_on(tmp_path: Path, template: str) -> None:
    row = _talk("assistant: Hello!", "user: q", "assistant: a")
    assert _pictures(tmp_path, row, template) == ["[assistant|⟦Hello!]⟧|[user|q]|[assistant|⟦a]⟧|"]
    assert _pictures(tmp_path, _talk("assistant: Hello!"), template) == ["[assistant|⟦Hello!]⟧|"]


def test_a_leading_assistant_turn_under_thinking_templates(tmp_path: Path) -> None:
    thinking = "{{- '' if messages[0].role == 'system' }}" + LAST_TURN_THINKS
    assert _pictures(tmp_path, _talk("assistant: Hello!", "user: q", "assistant: a"), thinking) == [
        f"[assistant|⟦{EMPTY}Hello!]⟧|",
        f"[assistant|Hello!]|[user|q]|[assistant|⟦{EMPTY}a]⟧|",
    ]


def test_what_the_template_refuses_is_named(tmp_path: Path) -> None:
    rows = [_talk("user: q", "assistant: a"), _talk("assistant: Hello!", "user: q", "assistant: a")]
    with pytest.raises(DataError, match=r"rows.jsonl, line 2: the chat template refuses .*roles must alternate"):
        pictures(tmp_path, rows, templates.MISTRAL)
    headless = templates.CHATML + "{% if messages[0].role == 'assistant' and add_generation_prompt %}x{% endif %}"
    with pytest.raises(DataError, match=r"rows.jsonl, line 2: the chat template rewrites history"):
        pictures(tmp_path, rows, headless)


def test_calls_as_texts_of_sharegpt(tmp_path: Path) -> None:
    call = json.dumps({"name": "look", "arguments": {"lamp": 1}})
    turns = [("human", "q"), ("function_call", call), ("function_call", call), ("observation", "red"),
             ("observation", "blue"), ("gpt", "Both.")]  # fmt: skip
    row = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    found = _pictures(tmp_path, row, LAST_TURN_THINKS)
    assert [text.count("⟦") for text in found] == [1, 1, 1]
    assert [text.partition("⟦")[2].partition("]")[0] for text in found] == [
        EMPTY + answer for answer in (call, call, "Both.")
    ]
