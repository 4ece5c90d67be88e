"""Excerpts in the shapes of nine demonstration files of a well-known trainer: right, or refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgetune.data.sources import read_source
from edgetune.errors import DataError
from tests.cases.rendering import TOOLS_TEMPLATE, pictures, transformers_picture

TOOL = {"name": "dim", "description": "Dim a lamp", "parameters": {"type": "object", "properties": {}}}
CALL = {"name": "dim", "arguments": {"level": 3}}
PICTURED = [{"role": "user", "content": "<image>Which lamp?"}, {"role": "assistant", "content": "The left one."}]
HEARD = [{"from": "human", "value": "Dim it."}]


def _alpaca(instruction: str, input_: str, output: str) -> dict[str, str]:
    return {"instruction": instruction, "input": input_, "output": output}


TRAINED: dict[str, tuple[dict[str, Any], str, str]] = {
    "alpaca_en_demo.json": (_alpaca("Name it.", "a lamp", "Lamp."), "Name it.\na lamp", "Lamp."),
    "alpaca_zh_demo.json": (_alpaca("说出它的名字。", "", "灯。"), "说出它的名字。", "灯。"),
    "identity.json": (_alpaca("hi", "", "Hello! I am a lamp."), "hi", "Hello! I am a lamp."),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mllm_demo.json": ({"messages": PICTURED, "images": ["1.jpg"]}, "images is not empty, and edgetune trains on text"),
    "mllm_audio_demo.json": ({"messages": PICTURED, "audios": ["1.mp3"]}, "audios is not empty"),
    "mllm_video_demo.json": ({"messages": PICTURED, "videos": ["1.mp4"]}, "videos is not empty"),
    "dpo_en_demo.json": (
        {
            "conversations": HEARD,
            "chosen": {"from": "gpt", "value": "Yes."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        "has chosen and rejected: these are rows for the objectives dpo, ",
    ),
    "kto_en_demo.json": ({"messages": PICTURED, "label": False}, "has the label false: these are rows"),
}


def _write(folder: Path, name: str, rows: list[Any]) -> str:
    (folder / name).write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")
    return str(folder / name)


@pytest.mark.parametrize("name", TRAINED)
def test_questions_and_answers_are_trained_on(tmp_path: Path, name: str) -> None:
    row, user, assistant = TRAINED[name]
    (read,) = read_source(_write(tmp_path, name, [row])).rows
    assert read.messages == [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    assert not read.unread


@pytest.mark.parametrize("name", REFUSED)
def test_rows_for_another_training_are_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    row, problem = REFUSED[name]
    with pytest.raises(DataError, match=rf"{name}, row 1: {problem}"):
        read_source(_write(tmp_path, name, [row]))


def test_plain_text_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "wiki_demo.txt").write_text("A lamp gives light.")
    with pytest.raises(DataError, match=r"wiki_demo.txt is plain text: these are rows for the objective pretrain"):
        read_source(str(tmp_path / "wiki_demo.txt"))


@pytest.mark.parametrize("name", ["glaive_toolcall_en_demo.json", "glaive_toolcall_zh_demo.json"])
def test_tools_and_calls_are_trained_on_as_transformers_renders_them(tmp_path: Path, name: str) -> None:
    texts = [("human", "Dim it."), ("function_call", json.dumps(CALL)), ("observation", "done"), ("gpt", "It is at 3.")]
    row = {"conversations": [{"from": who, "value": text} for who, text in texts], "tools": json.dumps([TOOL])}
    (read,) = read_source(_write(tmp_path, name, [row])).rows
    assert read.tools == [TOOL]
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
    plain = {
        "tools": [TOOL],
        "messages": [
            {"role": "user", "content": "Dim it."}, call, {"role": "tool", "content": "done"},
            {"role": "assistant", "content": "It is at 3."},
        ],
    }  # fmt: skip
    assert pictures(tmp_path, [row], TOOLS_TEMPLATE) == [transformers_picture(plain, TOOLS_TEMPLATE)]
