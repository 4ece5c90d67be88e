"""The responses API: the `openai` client, and what Codex sends."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from openai import BadRequestError
from openai.types.responses import Response

from tests.serving.conftest import Running


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


def test_a_text_is_answered(client: Any, model: str) -> None:
    reply = client.responses.create(model=model, input="dim the lights", max_output_tokens=8, temperature=0)
    assert reply.output_text
    assert reply.status in ("completed", "incomplete")
    assert reply.usage.output_tokens <= 9


def test_a_stream_gives_the_text_of_the_whole_reply(client: Any, model: str) -> None:
    options = {"model": model, "input": "dim the lights", "max_output_tokens": 8, "temperature": 0}
    whole = client.responses.create(**options)
    events = list(client.responses.create(**options, stream=True))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == text


def test_what_codex_sends_is_read(live: Running) -> None:
    body = {
        "model": "tiny", "instructions": "You are a coder.", "stream": True, "store": False, "include": [],
        "parallel_tool_calls": False, "prompt_cache_key": "x", "client_metadata": {"a": "b"},
        "reasoning": {"effort": "low", "summary": "auto"}, "tool_choice": "auto", "max_output_tokens": 4,
        "tools": [
            {"type": "function", "name": "shell", "parameters": {"type": "object"}, "strict": False},
            {"type": "web_search"}, {"type": "custom", "name": "apply_patch", "format": {"type": "grammar"}},
            {"type": "namespace", "name": "mcp"},
        ],
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "rules"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "list files"}]},
            {"type": "reasoning", "summary": [], "encrypted_content": None},
            {"type": "function_call", "call_id": "c1", "name": "shell", "arguments": '{"command": ["ls"]}'},
            {"type": "function_call_output", "call_id": "c1", "output": "a.txt"},
            {"type": "local_shell_call", "call_id": "l", "action": {"type": "exec", "command": ["ls"]}},
            {"type": "compaction", "encrypted_content": "x"}, {"type": "local_shell_call"},
        ],
    }  # fmt: skip
    reply = httpx.post(live.v1 + "/responses", json=body, timeout=60)
    events = events_of(reply.text)
    assert reply.status_code == 200, reply.text
    assert events[0]["type"] == "response.created"
    assert events[-1]["type"] in ("response.completed", "response.incomplete")
    assert reply.headers["x-edgetune-skipped-tools"] == "web_search, custom, namespace"
    assert reply.headers["x-edgetune-skipped-items"] == "local_shell_call, compaction"


def test_a_reply_is_what_the_client_declares(live: Running) -> None:
    """The client itself accepts missing fields; programs that read its types do not expect them."""
    asks = ({"input": "x"}, {"input": "x", "instructions": "Be brief.", "reasoning": {"effort": "low"}})
    for ask in asks:
        body = {"model": "tiny", "max_output_tokens": 2, **ask}
        Response.model_validate(httpx.post(live.v1 + "/responses", json=body, timeout=60).json())


def test_a_prompt_template_of_openai_is_refused(live: Running) -> None:
    reply = httpx.post(live.v1 + "/responses", json={"model": "tiny", "prompt": {"id": "p"}}, timeout=60)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "prompt"


def test_an_empty_probe_is_answered(live: Running) -> None:
    reply = httpx.post(live.v1 + "/responses", json={"model": "tiny", "input": [], "max_output_tokens": 1}, timeout=60)
    assert reply.status_code == 200, reply.text


def test_an_earlier_response_is_a_clean_error(client: Any) -> None:
    with pytest.raises(BadRequestError, match="send the whole conversation") as raised:
        client.responses.create(model="tiny", input="x", previous_response_id="resp_1")
    assert raised.value.param == "previous_response_id"
