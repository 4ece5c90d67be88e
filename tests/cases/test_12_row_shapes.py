"""Rows whose meaning is plain and whose keys are another tool's become the conversation that is meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgetune.data.formats import RowReader, to_chat_row
from edgetune.data.problems import RowProblem
from edgetune.errors import DataError
from tests.cases.rendering import TOOLS_TEMPLATE, encode, pictures, transformers_picture
from tests.data import templates

USER, ANSWER = {"role": "user", "content": "Lamp?"}, {"role": "assistant", "content": "On."}
SYSTEM = {"role": "system", "content": "Be brief."}
PLAIN = {"messages": [USER, ANSWER]}
TOOL = {"type": "function", "function": {"name": "dim", "parameters": {"type": "object", "properties": {}}}}
CALL = '{"name": "dim", "arguments": {"level": 3}}'


def _turns(role: str, text: str, user: str = "user", assistant: str = "assistant") -> list[dict[str, str]]:
    return [{role: user, text: "Lamp?"}, {role: assistant, text: "On."}]


SHAPES: dict[str, Any] = {
    "conversations of role": {"conversations": _turns("role", "content")},
    "messages of from": {"messages": _turns("from", "value", "human", "gpt")},
    "capitals": {"conversations": _turns("from", "value", "Human", "Assistant")},
    "capital keys": {"Messages": _turns("Role", "Content", "USER", "ASSISTANT")},
    "list": _turns("role", "content"),
    "columns": {"conversations": {"from": ["human", "gpt"], "value": ["Lamp?", "On."]}},
    "columns with nulls": {"messages": {"role": ["user", "assistant"], "content": ["Lamp?", "On."], "name": None}},
    "json text": {"messages": json.dumps(_turns("role", "content"))},
    "python text": {"messages": str(_turns("role", "content"))},
    "conversation": {"conversation": _turns("role", "content")},
    "ai": {"messages": _turns("role", "content", "human", "ai")},
    "model and parts": {
        "contents": [{"role": "user", "parts": [{"text": "Lamp?"}]}, {"role": "model", "parts": [{"text": "On."}]}]
    },
    "speaker": {"dialogue": _turns("speaker", "utterance", "User", "Bot")},
    "type": {"messages": _turns("type", "content", "human", "ai")},
    "prompter": {"thread": _turns("role", "text", "prompter", "assistant")},
    "role and text": {"messages": _turns("role", "text")},
    "dialog": {"dialog": _turns("role", "content")},
    "turns": {"turns": _turns("author", "message", "user", "chat-bot")},
    "a number under a known key": {"turns": 2, "question": "Lamp?", "answer": "On."},
    "objects under a known key": {"items": [{"id": 1}], "question": "Lamp?", "answer": "On."},
    "a text under a known key": {"conversation": "about lamps", "question": "Lamp?", "answer": "On."},
    "an empty list beside": {"messages": [], "conversations": _turns("role", "content")},
    "exchange": {"conversation": [{"human": "Lamp?", "assistant": "On."}]},
    "exchange of xtuner": {"conversation": [{"system": "", "input": "Lamp?", "output": "On."}]},
    "a key for the role": {"conversation": [{"user": "Lamp?"}, {"assistant": "On."}]},
    "instruction and response": {"instruction": "Lamp?", "response": "On."},
    "problem": {"problem": "Lamp?", "solution": "On."},
    "capital question": {"Question": "Lamp?", "Answer": "On."},
    "user and assistant": {"user": "Lamp?", "assistant": "On."},
    "query": {"query": "Lamp?", "response": "On."},
    "inputs": {"inputs": "Lamp?", "targets": "On."},
    "empty instruction": {"input": "Lamp?", "output": "On.", "instruction": ""},
    "empty input": {"instruction": "Lamp?", "input": "", "output": "On."},
    "blank prompt beside": {"prompt": "", "question": "Lamp?", "answer": "On."},
    "one part": {"messages": [{"role": "user", "content": {"type": "text", "text": "Lamp?"}}, ANSWER]},
    "trl": {"prompt": [USER], "completion": [ANSWER]},
    "trl with other names": {
        "prompt": [{"from": "human", "value": "Lamp?"}], "completion": {"from": "gpt", "value": "On."},
    },
}  # fmt: skip


@pytest.mark.parametrize("row", SHAPES.values(), ids=SHAPES)
def test_a_shape_of_another_tool_is_the_plain_conversation(tmp_path: Path, row: Any) -> None:
    encoding = encode(tmp_path, [row, PLAIN])
    assert encoding.rows[0] == encoding.rows[1]
    assert pictures(tmp_path, [row]) == [transformers_picture(PLAIN, templates.CHATML)]
    beside = {"items", "conversation", "turns"} & set(row) if "question" in row else set()
    assert set(encoding.usage.unused) == beside


@pytest.mark.parametrize(
    "row",
    [
        {"system": "Be brief.", "conversations": _turns("role", "content")},
        {"system": "Be brief.", "messages": _turns("role", "content")},
        {"system": "Be brief.", "messages": [SYSTEM, USER, ANSWER]},
        {"System_Prompt": "Be brief.", "question": "Lamp?", "response": "On."},
        {"system": [{"text": "Be brief."}], "messages": [USER, ANSWER]},
        {"systemInstruction": {"parts": [{"text": "Be brief."}]}, "contents": _turns("role", "content")},
        {"conversation": [{"system": "Be brief.", "input": "Lamp?", "output": "On."}]},
        {"messages": [{"role": "developer", "content": "Be brief."}, USER, ANSWER]},
    ],
)
def test_a_system_prompt_beside_the_turns_comes_first(row: Any) -> None:
    read = to_chat_row(row)
    assert read.messages == [SYSTEM, USER, ANSWER]
    assert not read.unread


def test_another_system_prompt_beside_the_turns_is_named() -> None:
    read = to_chat_row({"system": "Be long.", "messages": [SYSTEM, USER, ANSWER]})
    assert read.messages == [SYSTEM, USER, ANSWER]
    assert read.unread == ("system beside messages that begin with a system message",)


def test_dolly_is_alpaca() -> None:
    row = {"instruction": "Lamp?", "context": "It is new.", "response": "On.", "category": "open_qa"}
    read = to_chat_row(row)
    assert read.messages == [{"role": "user", "content": "Lamp?\nIt is new."}, ANSWER]
    assert read.unread == ("category",)


@pytest.mark.parametrize(
    "row",
    [
        {"query": "Lamp?", "response": "On.", "history": [["Hi.", "Hello."]]},
        {"instruction": "Lamp?", "output": "On.", "history": '[["Hi.", "Hello."]]'},
        {
            "query": "Lamp?", "response": "On.",
            "history": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}],
        },
    ],
)  # fmt: skip
def test_a_history_is_earlier_turns(row: Any) -> None:
    earlier = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    assert to_chat_row(row).messages == [*earlier, USER, ANSWER]


@pytest.mark.parametrize("name", ["function_call", "tool_call", "Function-Call"])
@pytest.mark.parametrize("result", ["observation", "tool", "tool_response", "function"])
def test_calls_and_results_under_any_name_are_rendered(tmp_path: Path, name: str, result: str) -> None:
    texts = [("human", "Dim it."), (name, CALL), (result, "done"), ("gpt", "It is at 3.")]
    row = {"tools": json.dumps([TOOL]), "conversations": [{"from": who, "value": text} for who, text in texts]}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": json.loads(CALL)}]}
    plain: Any = {
        "tools": [TOOL],
        "messages": [
            {"role": "user", "content": "Dim it."}, call, {"role": "tool", "content": "done"},
            {"role": "assistant", "content": "It is at 3."},
        ],
    }  # fmt: skip
    assert pictures(tmp_path, [row], TOOLS_TEMPLATE) == [transformers_picture(plain, TOOLS_TEMPLATE)]


def test_calls_as_the_answers_to_a_query_are_rendered(tmp_path: Path) -> None:
    row = {"query": "Dim it.", "tools": json.dumps([TOOL]), "answers": f"[{CALL}]"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": json.loads(CALL)}]}
    plain: Any = {"tools": [TOOL], "messages": [{"role": "user", "content": "Dim it."}, call]}
    assert pictures(tmp_path, [row], TOOLS_TEMPLATE) == [transformers_picture(plain, TOOLS_TEMPLATE)]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "<|im_start|>user\nLamp?<|im_end|>\n"}, "has text: these are rows for the objective pretrain"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "has chosen and rejected: these are rows for the obj"),
        ({"messages": [USER, ANSWER], "rejected_response": "b"}, "has rejected_response: these are rows for the obj"),
        ({"Prompt": "q", "Chosen": "a", "Rejected": "b"}, "has Chosen and Rejected: these are rows for the obj"),
        ({"messages": [USER, ANSWER], "label": False}, "has the label false: these are rows"),
        ({"prompt": "q", "completion": "a", "label": "True"}, "has the label true: these are rows"),
        ({"question": "q", "answer": ["a", "b"]}, "answer is a list of 2 texts; give one text"),
        ({"messages": ["Lamp?", "On."]}, "message 1 of messages is a text without a role"),
        ({"messages": {"role": ["user"], "content": ["a", "b"]}}, r"that differ in length \(role: 1, content: 2\)"),
        ({"messages": [USER], "response": "On."}, "nothing to learn from it; response beside the messages"),
        ({"query": "q", "response": "a", "history": [["q", None]]}, "history is missing"),
        ({"instruction": [USER, ANSWER, USER], "input": "i", "output": "a"}, "input cannot follow instruction"),
        ({"messages": "Lamp? On."}, "messages is not a list of messages: messages is a text that is not JSON"),
        ({"messages": [USER, {"content": "a"}]}, "message 2: has no role; its keys are content"),
        ({"messages": [USER, {**ANSWER, "loss_mask": [0, 1]}]}, "loss_mask marks parts of a message"),
        ({"messages": [USER, ANSWER], "sample_weight": 0.5}, "sample_weight of the row is 0.5"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_with_the_reason(row: Any, problem: str) -> None:
    with pytest.raises(RowProblem, match=problem):
        to_chat_row(row)


def test_an_unknown_row_is_answered_with_what_to_rename(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="its keys are frage, antwort; looked for") as caught:
        encode(tmp_path, [{"frage": "Lamp?", "antwort": "On."}])
    assert "data.columns, such as {user: question, assistant: reply}" in (caught.value.hint or "")


def test_a_history_beside_messages_is_counted() -> None:
    read = to_chat_row({**PLAIN, "history": [["q", "a"]]})
    assert (read.messages, read.unread) == ([USER, ANSWER], ("history",))


@pytest.mark.parametrize("key", ["train", "training", "loss", "trainable"])
def test_a_flag_of_a_row_is_honored_and_a_figure_under_its_name_is_counted(key: str) -> None:
    assert to_chat_row({**PLAIN, key: False}).untrained == {1}
    assert to_chat_row({**PLAIN, key: True}).untrained == frozenset()
    read = to_chat_row({**PLAIN, key: 0.35})
    assert (read.untrained, read.unread) == (frozenset(), (key,))


def test_columns_that_are_named_by_hand_come_before_the_usual_ones() -> None:
    reader = RowReader(columns={"user": "frage", "assistant": "label", "system": "regeln"})
    row = {"frage": "Lamp?", "label": "On.", "regeln": "Be brief.", "prompt": "x", "completion": "y"}
    read = reader.read(row)
    assert (read.messages, read.unread) == ([SYSTEM, USER, ANSWER], ("prompt", "completion"))
    assert reader.read(PLAIN).messages == [USER, ANSWER]
    reader.check_columns()


def test_roles_that_are_named_by_hand() -> None:
    reader = RowReader(
        columns={"messages": "talk", "role": "who", "content": "said", "tools": "abilities"},
        roles={"caller": "user", "Clerk": "assistant"},
    )
    talk = [{"who": "Caller", "said": "Lamp?", "role": "x"}, {"who": "clerk", "said": "On."}]
    read = reader.read({"talk": talk, "abilities": [TOOL]})
    assert (read.messages, read.tools, read.unread) == ([USER, ANSWER], [TOOL], ("role of a message",))
    reader.check_columns()
