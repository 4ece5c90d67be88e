"""Tools: calls are found in each syntax, validated, and forced where the request says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anthropic
import ollama
import pytest
from openai import BadRequestError

from edgetune.serving.conversation import Tool, ToolCall
from edgetune.serving.tool_calls import HERMES, Toolbox, ToolCallReader
from tests.serving.conftest import Running, openai_client
from tests.serving.scripted import scripted


def anthropic_client(server: Running) -> Any:
    return anthropic.Anthropic(base_url=server.url, api_key="none")


LEVELS = {
    "type": "object",
    "properties": {"level": {"enum": ["low", "high"]}},
    "required": ["level"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "dim", "description": "Dim a lamp", "parameters": LEVELS}}]
ASK = [{"role": "user", "content": "dim the lights"}]
CALL = '{"name": "dim", "arguments": {"level": "low"}}'
LLAMA = '{"name": "dim", "parameters": {"level": "low"}}'


def read(text: str, width: int = 1000, syntax: Any = None) -> tuple[str, list[tuple[str, Any]]]:
    reader = ToolCallReader(Toolbox([Tool("dim", "", LEVELS), Tool("stop")], ["tools.0", "tools.1"]), syntax)
    pieces = [text[at : at + width] for at in range(0, len(text), width)]
    found = [each for piece in pieces for each in reader.feed(piece)] + list(reader.finish())
    calls = [(each.name, json.loads(each.arguments)) for each in found if isinstance(each, ToolCall)]
    return "".join(each for each in found if isinstance(each, str)), calls


DIM = ("dim", {"level": "low"})
READINGS: dict[str, tuple[str, str, list[tuple[str, Any]]]] = {
    "hermes": (f"Yes.\n<tool_call>\n{CALL}\n</tool_call>", "Yes.", [DIM]),
    "two hermes": (f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>\n", "", [DIM, DIM]),
    "coder": ("<tool_call><function=dim>\n<parameter=level>\nlow\n</parameter>\n</function></tool_call>", "", [DIM]),
    "mistral list": (f"[TOOL_CALLS] [{CALL}, {CALL}]", "", [DIM, DIM]),
    "mistral names": ('[TOOL_CALLS]dim[ARGS]{"level": "low"}[TOOL_CALLS]stop[ARGS]{}', "", [DIM, ("stop", {})]),
    "llama": (LLAMA, "", [DIM]),
    "two llama": (f"{LLAMA}; {LLAMA}", "", [DIM, DIM]),
    "python tag": (f"<|python_tag|>{LLAMA}", "", [DIM]),
    "arguments as text": (
        '<tool_call>{"name": "dim", "arguments": "{\\"level\\": \\"low\\"}"}</tool_call>', "", [DIM],
    ),
    "no call": ("The <tool_ is a [TOOL word", "The <tool_ is a [TOOL word", []),
    "json answer": ('{"answer": 1}', '{"answer": 1}', []),
    "not json": ("<tool_call>{oops</tool_call> then", "<tool_call>{oops</tool_call> then", []),
    "unknown tool": (f"<tool_call>{CALL.replace('dim', 'cut')}</tool_call>",
                     f"<tool_call>{CALL.replace('dim', 'cut')}</tool_call>", []),
    "wrong arguments": (f"<tool_call>{CALL.replace('low', 'off')}</tool_call>",
                        f"<tool_call>{CALL.replace('low', 'off')}</tool_call>", []),
    "unfinished": ('<tool_call>{"name": "dim", "argu', '<tool_call>{"name": "dim", "argu', []),
    "space": (" \n ", " \n ", []),
}  # fmt: skip


@pytest.mark.parametrize("width", [1, 7, 1000])
@pytest.mark.parametrize("name", READINGS)
def test_calls_are_found_in_every_syntax(name: str, width: int) -> None:
    text, answer, calls = READINGS[name]
    assert read(text, width) == (answer, calls)


def test_a_forced_call_has_begun_already() -> None:
    assert read(CALL, 5, HERMES) == ("", [DIM])


@pytest.mark.parametrize("stream", [False, True])
def test_calls_reach_openais_client(file: Path, stream: bool) -> None:
    answer = f"Yes.\n<tool_call>\n{CALL}\n</tool_call>"
    with scripted(file, answer) as (server, _), openai_client(server) as client:
        options: dict[str, Any] = {"model": "tiny", "messages": ASK, "tools": TOOLS}
        if stream:
            chunks = list(client.chat.completions.create(**options, stream=True))
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Yes."
            calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
            reason = chunks[-1].choices[0].finish_reason
        else:
            choice = client.chat.completions.create(**options).choices[0]
            assert choice.message.content == "Yes."
            calls, reason = choice.message.tool_calls, choice.finish_reason
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [DIM]
    assert reason == "tool_calls"


def test_calls_reach_anthropics_client(file: Path) -> None:
    answer = f"Yes.<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>"
    tools = [{"name": "dim", "input_schema": LEVELS}]
    with scripted(file, answer, answer) as (server, _), anthropic_client(server) as client:
        options: Any = {"model": "tiny", "messages": ASK, "tools": tools, "max_tokens": 200}
        whole = client.messages.create(**options)
        with client.messages.stream(**options) as stream:
            streamed = stream.get_final_message()
    for reply in (whole, streamed):
        assert reply.stop_reason == "tool_use"
        assert [block.type for block in reply.content] == ["text", "tool_use", "tool_use"]
        assert reply.content[1].input == {"level": "low"}


def test_calls_reach_the_responses_api_and_ollama(file: Path) -> None:
    answer = f"<tool_call>{CALL}</tool_call>"
    function = {"type": "function", "name": "dim", "parameters": LEVELS}
    with scripted(file, answer, answer) as (server, _):
        with openai_client(server) as client:
            reply = client.responses.create(model="tiny", input="dim", tools=[function])
        with ollama.Client(host=server.url) as other:
            message = other.chat(model="tiny", messages=ASK, tools=TOOLS).message
    assert [(item.name, json.loads(item.arguments)) for item in reply.output] == [DIM]
    assert [(call.function.name, call.function.arguments) for call in message.tool_calls or ()] == [DIM]


def test_one_call_alone_ends_the_answer_where_calls_are_not_parallel(file: Path) -> None:
    answer = f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>"
    with scripted(file, answer) as (server, _), openai_client(server) as client:
        reply = client.chat.completions.create(model="tiny", messages=ASK, tools=TOOLS, parallel_tool_calls=False)
    assert len(reply.choices[0].message.tool_calls) == 1


def test_tools_that_may_not_be_called_are_not_shown_to_the_model(file: Path) -> None:
    with scripted(file, CALL, CALL) as (server, seen), openai_client(server) as client:
        create = client.chat.completions.create
        reply = create(model="tiny", messages=ASK, tools=TOOLS, tool_choice="none")
        create(model="tiny", messages=ASK)
    assert reply.choices[0].message.content == CALL
    assert seen[0].ids == seen[1].ids


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "dim"}}])
def test_a_call_is_forced_from_any_model(client: Any, model: str, choice: Any) -> None:
    other = {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "maxProperties": 0}}}
    reply = client.chat.completions.create(
        model=model, messages=ASK, tools=[*TOOLS, other], tool_choice=choice, max_tokens=200, temperature=0
    )
    message = reply.choices[0].message
    if reply.choices[0].finish_reason == "length":  # the model wrote nothing but spaces, which JSON permits
        assert not message.tool_calls
        return
    (call,) = message.tool_calls
    assert message.content is None
    assert call.function.name in (("dim",) if isinstance(choice, dict) else ("dim", "stop"))
    if call.function.name == "dim":
        assert json.loads(call.function.arguments)["level"] in ("low", "high")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "none"}}}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS * 2}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "x", "parameters": {"type": "no"}}}]}, "tools.0"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ],
)
def test_a_wrong_tool_is_named(client: Any, change: dict[str, Any], field: str) -> None:
    options = {"model": "tiny", "messages": ASK, "tools": TOOLS} | change
    with pytest.raises(BadRequestError) as raised:
        client.chat.completions.create(**options)
    assert raised.value.param == field


def test_results_of_tools_are_read_back(live: Running, client: Any) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "dim", "arguments": '{"level": "low"}'}}
    messages = [
        *ASK, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
    ]  # fmt: skip
    assert client.chat.completions.create(model="tiny", messages=messages, tools=TOOLS, max_tokens=2).choices
