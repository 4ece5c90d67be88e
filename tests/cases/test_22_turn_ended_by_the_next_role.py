"""A turn that the template closes with nothing ends with the marker of the next role, if that is a stop token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from edgetune.data.chat import ChatTemplate
from edgetune.data.dataset import encode_all
from edgetune.data.preview import highlight_row
from edgetune.data.sources import read_source
from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.errors import DataError
from tests.cases.rendering import write_jsonl
from tests.converters import vocabularies

MARKERS = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
ROLES = (
    "[gMASK]<sop>{% for m in messages %}<|{{ 'observation' if m.role == 'tool' else m.role }}|>\n"
    "{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# As GLM-4.5's: a line before each marker, and the reasoning of the last turns only.
REASONING = (
    "[gMASK]<sop>{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "<|{{ 'observation' if m.role == 'tool' else m.role }}|>\n"
    "{% if m.role == 'assistant' %}{% if loop.index0 > ns.last and m.reasoning_content %}"
    "<think>{{ m.reasoning_content }}</think>\n{% else %}<think></think>\n{% endif %}{% endif %}{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
Q, A = {"role": "user", "content": "Lamp 1?"}, {"role": "assistant", "content": "On."}
CALL = {"role": "assistant", "content": "look(4)"}
RESULT = {"role": "tool", "content": "off"}


def _tokenizer(folder: Path, stops: tuple[str, ...] = ("<|user|>", "<|observation|>")) -> TextTokenizer:
    folder.mkdir(exist_ok=True)
    vocabularies.byte_level(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(list(MARKERS))
    vocabularies.save(tokenizer, folder, eos_token="<|endoftext|>")
    ids = [tokenizer.token_to_id(text) for text in ("<|endoftext|>", *stops)]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return TextTokenizer.from_directory(folder)


def _pictures(folder: Path, rows: list[list[dict[str, Any]]], template: str = ROLES, **options: Any) -> list[str]:
    tokenizer = _tokenizer(folder / "base", **options)
    source = read_source(write_jsonl(folder / "rows.jsonl", [{"messages": row} for row in rows]))
    encoding = encode_all(ChatTemplate(template), tokenizer, source.rows, 4096)
    return [
        highlight_row(row, tokenizer, color=False).plain.replace("[gMASK]<sop>", "").replace("\n", "|")
        for row in encoding.rows
    ]


def test_the_marker_that_follows_belongs_to_the_turn(tmp_path: Path) -> None:
    more = [Q, {**A, "content": "Off."}, Q, A]
    assert _pictures(tmp_path, [[Q, A], more, [Q, CALL, RESULT, A]]) == [
        "<|user|>|Lamp 1?<|assistant|>|⟦On.<|user|>⟧",
        "<|user|>|Lamp 1?<|assistant|>|⟦Off.<|user|>⟧|Lamp 1?<|assistant|>|⟦On.<|user|>⟧",
        "<|user|>|Lamp 1?<|assistant|>|⟦look(4)<|observation|>⟧|off<|assistant|>|⟦On.<|user|>⟧",
    ]


def test_a_tool_call_at_the_end_is_closed_by_the_observation(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "look"}}]}
    assert _pictures(tmp_path, [[Q, call]]) == ["<|user|>|Lamp 1?<|assistant|>|⟦look<|observation|>⟧"]


def test_messages_that_are_left_out_at_the_end_still_say_what_closes_the_turn(tmp_path: Path) -> None:
    assert _pictures(tmp_path, [[Q, CALL, RESULT], [Q, A, Q]]) == [
        "<|user|>|Lamp 1?<|assistant|>|⟦look(4)<|observation|>⟧",
        "<|user|>|Lamp 1?<|assistant|>|⟦On.<|user|>⟧",
    ]


def test_consecutive_answers_and_undeclared_roles_are_closed_by_the_user(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    assert _pictures(tmp_path, [[Q, CALL, A], [Q, A, system, A]]) == [
        "<|user|>|Lamp 1?<|assistant|>|⟦look(4)<|user|>⟧",
        "<|user|>|Lamp 1?<|assistant|>|look(4)<|assistant|>|⟦On.<|user|>⟧",
        "<|user|>|Lamp 1?<|assistant|>|⟦On.<|user|>⟧",
        "<|user|>|Lamp 1?<|assistant|>|On.<|system|>|Be brief.<|assistant|>|⟦On.<|user|>⟧",
    ]


def test_reasoning_that_a_following_question_removes_stays_in_its_own_turn(tmp_path: Path) -> None:
    answer = {**A, "reasoning_content": "hm"}
    assert _pictures(tmp_path, [[Q, answer, Q, answer], [Q, {**CALL, "reasoning_content": "hm"}, RESULT, answer]],
                     REASONING) == [
        "<|user|>|Lamp 1?<|assistant|>|⟦<think>hm</think>|On.<|user|>⟧",
        "<|user|>|Lamp 1?<|assistant|>|<think></think>|On.<|user|>|Lamp 1?<|assistant|>|"
        "⟦<think>hm</think>|On.<|user|>⟧",
        "<|user|>|Lamp 1?<|assistant|>|⟦<think>hm</think>|look(4)<|observation|>⟧|off<|assistant|>|"
        "⟦<think>hm</think>|On.<|user|>⟧",
    ]  # fmt: skip


def test_a_line_before_the_marker_belongs_to_the_turn_too(tmp_path: Path) -> None:
    lines = ROLES.replace("<|{{", "{{ '' if loop.first else '\n' }}<|{{").replace(
        "<|assistant|>\n{% endif", "{{ '\n' }}<|assistant|>\n{% endif"
    )
    assert _pictures(tmp_path, [[Q, A, Q, A]], lines) == [
        "<|user|>|Lamp 1?|<|assistant|>|⟦On.|<|user|>⟧|Lamp 1?|<|assistant|>|⟦On.|<|user|>⟧"
    ]


def test_without_such_a_stop_token_the_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl, line 1: .* without a stop token.* it ends with 'On.'"):
        _pictures(tmp_path, [[Q, A]], stops=())
