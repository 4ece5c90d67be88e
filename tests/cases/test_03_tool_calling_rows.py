"""Tools and tool calls of rows reach the template as transformers passes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgetune.errors import DataError
from tests.cases.rendering import TOOLS_TEMPLATE, encode, pictures, transformers_picture

DIM = {"type": "object", "properties": {"level": {"type": "integer"}}, "required": ["level"]}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "dim", "description": "Dim a lamp", "parameters": DIM}}
USER = {"role": "user", "content": "Dim the lamp to 3."}
ANSWER = [
    {"role": "tool", "tool_call_id": "c1", "name": "dim", "content": "done"},
    {"role": "assistant", "content": "It is at 3 now."},
]
SYSTEM_TEXT = "<|im_start|>system\nYou may call these functions:\n" + json.dumps(TOOL) + "\n<|im_end|>\n"
EXPECTED = (
    SYSTEM_TEXT + "<|im_start|>user\nDim the lamp to 3.<|im_end|>\n"
    '<|im_start|>assistant\n⟦<call>dim {"level": 3}</call><|im_end|>⟧\n'
    "<|im_start|>tool dim c1\ndone<|im_end|>\n<|im_start|>assistant\n⟦It is at 3 now.<|im_end|>⟧\n"
)


def _call(arguments: Any, **content: Any) -> dict[str, Any]:
    call = {"type": "function", "id": "c1", "function": {"name": "dim", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call], **content}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])], ids=["list", "json"])
@pytest.mark.parametrize(
    "call",
    [
        _call('{"level": 3}', content=""), _call('{"level": 3}', content=None), _call('{"level": 3}'),
        _call({"level": 3}, content=""), _call({"level": 3}, content=None, name=None, reasoning_content=None),
    ],
)  # fmt: skip
def test_calls_are_trained_on_as_transformers_renders_them(tmp_path: Path, call: Any, tools: Any) -> None:
    row = {"tools": tools, "messages": [USER, call, *ANSWER]}
    encoding = encode(tmp_path, [row], TOOLS_TEMPLATE)
    assert pictures(tmp_path, [row], TOOLS_TEMPLATE) == [EXPECTED]
    assert transformers_picture(row, TOOLS_TEMPLATE) == EXPECTED
    assert not encoding.usage.unused


@pytest.mark.parametrize("tools", [None, [], "[]", ""])
def test_no_tools_are_no_tools(tmp_path: Path, tools: Any) -> None:
    (shown,) = pictures(tmp_path, [{"tools": tools, "messages": [USER, ANSWER[1]]}], TOOLS_TEMPLATE)
    assert shown.startswith("<|im_start|>user")


def _sharegpt(call: str) -> dict[str, Any]:
    turns = [("human", USER["content"]), ("function_call", call), ("observation", "done"), ("gpt", "It is at 3 now.")]
    return {"tools": json.dumps([TOOL]), "conversations": [{"from": who, "value": text} for who, text in turns]}


def test_sharegpt_calls_and_observations_become_tool_calls_and_results(tmp_path: Path) -> None:
    (shown,) = pictures(tmp_path, [_sharegpt('{"name": "dim", "arguments": {"level": 3}}')], TOOLS_TEMPLATE)
    assert shown == EXPECTED.replace("tool dim c1", "tool")


def test_sharegpt_calls_stay_text_where_the_template_has_no_calls_and_the_tools_are_counted(tmp_path: Path) -> None:
    text = '{"name": "dim", "arguments": {"level": 3}}'
    encoding = encode(tmp_path, [_sharegpt(text)])
    assert f"⟦{text}<|im_end|>⟧" in pictures(tmp_path, [_sharegpt(text)])[0]
    assert encoding.usage.describe() == [
        "tools, which the chat template does not render: 1 row, for example rows.jsonl, line 1"
    ]


def test_the_older_form_of_calls_is_rendered_as_the_newer(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "function_call": {"name": "dim", "arguments": '{"level": 3}'}}
    result = {"role": "function", "name": "dim", "content": "done"}
    row = {"functions": [TOOL["function"]], "messages": [USER, call, result, ANSWER[1]]}
    assert pictures(tmp_path, [row], TOOLS_TEMPLATE) == [EXPECTED.replace("dim c1", "dim")]


def test_a_call_that_the_template_does_not_render_is_no_empty_answer(tmp_path: Path) -> None:
    row = {"messages": [USER, _call({"level": 3}, content=""), *ANSWER]}
    with pytest.raises(
        DataError, match=r"rows.jsonl, line 1: the chat template does not render tool_calls, so an empty"
    ):
        encode(tmp_path, [row])


def test_a_null_content_is_never_trained_on_as_a_word(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (shown,) = pictures(tmp_path, [{"messages": [USER, _call({"level": 3}, content=None)]}], template)
    assert '<|im_start|>assistant\n⟦[{"type": "function"' in shown
    assert "None" not in shown


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"tools": "a hammer", "messages": [USER, ANSWER[1]]}, "tools is a text that is not JSON"),
        ({"tools": [3], "messages": [USER, ANSWER[1]]}, "tools is not a list of objects: it holds int"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 2: content is missing"),
        (
            {"messages": [USER, {"role": "tool", "content": {"level": 3}}, ANSWER[1]]},
            "message 2: content is not a text but dict; write it as JSON text",
        ),
    ],
)
def test_what_stays_unsupported_is_named(tmp_path: Path, row: Any, problem: str) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl, line 1: {problem}"):
        encode(tmp_path, [row], TOOLS_TEMPLATE)


def test_nulls_that_fill_the_columns_of_a_table_are_absent_keys(tmp_path: Path) -> None:
    arrow: Any = pytest.importorskip("pyarrow")
    parquet: Any = pytest.importorskip("pyarrow.parquet")
    from edgetune.data.sources import read_source

    row = {"tools": [TOOL], "messages": [USER, _call({"level": 3}, content=None), *ANSWER]}
    parquet.write_table(arrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
    (read,) = read_source(str(tmp_path / "rows.parquet")).rows
    assert read.messages == row["messages"]
    assert read.tools == [TOOL]
