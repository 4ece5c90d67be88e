"""The `anthropic` client, and what Claude Code sends, against a running server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from tests.serving.conftest import Running

GREEDY = {"temperature": 0}
ASK = [{"role": "user", "content": "dim the lights"}]


@pytest.fixture
def client(live: Running) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0) as opened:
        yield opened


def test_a_message_is_answered(client: Any, model: str) -> None:
    reply = client.messages.create(model=model, messages=ASK, max_tokens=8, extra_body=GREEDY)
    assert reply.content[0].type == "text"
    assert reply.stop_reason in ("end_turn", "max_tokens")
    assert 0 < reply.usage.output_tokens <= 9


def test_a_stream_gives_the_text_of_the_whole_reply(client: Any, model: str) -> None:
    whole = client.messages.create(model=model, messages=ASK, max_tokens=8, extra_body=GREEDY)
    with client.messages.stream(model=model, messages=ASK, max_tokens=8, extra_body=GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_the_first_event_has_the_tokens_of_the_prompt(client: Any, model: str) -> None:
    counted = client.messages.count_tokens(model=model, messages=ASK, system="Be brief.").input_tokens
    stream = client.messages.create(
        model=model, messages=ASK, system="Be brief.", max_tokens=2, stream=True, extra_body=GREEDY
    )
    events = list(stream)
    assert events[0].type == "message_start"
    assert events[0].message.usage.input_tokens == counted
    assert [events[-2].type, events[-1].type] == ["message_delta", "message_stop"]


def test_a_stop_sequence_is_named(client: Any, live: Running) -> None:
    text = client.messages.create(model="endless", messages=ASK, max_tokens=12, extra_body=GREEDY).content[0].text
    stop = text[3:5]
    reply = client.messages.create(
        model="endless", messages=ASK, max_tokens=12, extra_body=GREEDY, stop_sequences=[stop]
    )
    assert reply.stop_reason == "stop_sequence"
    assert reply.stop_sequence == stop
    assert "".join(block.text for block in reply.content) == text[: text.index(stop)]


def test_what_claude_code_sends_is_read(live: Running) -> None:
    body = {
        "model": "tiny", "max_tokens": 4, "stream": True, "metadata": {"user_id": "x"}, "betas": ["a"],
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=1.2; cch=abc"},
            {"type": "text", "text": "You are a coder.", "cache_control": {"type": "ephemeral"}},
        ],
        "tools": [{"name": "Read", "description": "Read a file", "input_schema": {"type": "object"}}],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "read a.txt"}]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""},
             {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"path": "a.txt"}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "hello"}]},
        ],
    }  # fmt: skip
    reply = httpx.post(live.v1 + "/messages?beta=true", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    assert reply.text.startswith("event: message_start")
    assert reply.text.rstrip().endswith('data: {"type":"message_stop"}')
    assert "x-edgetune-ignored-fields" not in reply.headers


def test_a_prefilled_answer_is_continued(client: Any, model: str) -> None:
    text = client.messages.create(model="endless", messages=ASK, max_tokens=8, extra_body=GREEDY).content[0].text
    begun = [*ASK, {"role": "assistant", "content": text[:4]}]
    reply = client.messages.create(model="endless", messages=begun, max_tokens=8, extra_body=GREEDY)
    assert reply.content[0].text


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"max_tokens": "many"}, "max_tokens"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content.0.type"),
        ({"tool_choice": {"type": "tool", "name": "nothing"}}, "tool_choice"),
    ],
)
def test_a_wrong_field_is_named_in_anthropics_error(live: Running, change: dict[str, Any], field: str) -> None:
    body = {"model": "tiny", "max_tokens": 4, "messages": ASK} | change
    reply = httpx.post(live.v1 + "/messages", json=body)
    assert reply.status_code == 400
    assert reply.json()["type"] == "error"
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert reply.json()["error"]["param"] == field


def test_documents_and_search_results_that_are_text_are_read(client: Any) -> None:
    def count(*blocks: dict[str, Any]) -> int:
        content = [*blocks, {"type": "text", "text": "dim"}]
        tokens: int = client.messages.count_tokens(
            model="tiny", messages=[{"role": "user", "content": content}]
        ).input_tokens
        return tokens

    body = "the bedroom lamp is blue"
    text = count({"type": "text", "text": f"{body}\n"})
    plain = {"type": "text", "media_type": "text/plain", "data": body}
    assert count({"type": "document", "source": plain}) == text
    parts = {"type": "content", "content": [{"type": "text", "text": body}]}
    assert count({"type": "document", "source": parts, "citations": {"enabled": False}}) == text
    assert count({"type": "document", "source": plain, "title": "Lamps"}) > text
    found = {"type": "search_result", "source": "s", "title": "t", "content": [{"type": "text", "text": body}]}
    assert count(found) > text
    with pytest.raises(anthropic.BadRequestError, match="document"):
        count({"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "AA=="}})


def test_tools_that_anthropic_runs_are_named_in_a_header(live: Running) -> None:
    tools = [{"type": "web_search_20250305", "name": "web_search"}, {"name": "dim", "input_schema": {"type": "object"}}]
    reply = httpx.post(
        live.url + "/v1/messages", json={"model": "tiny", "messages": ASK, "max_tokens": 2, "tools": tools}, timeout=60
    )
    assert reply.status_code == 200
    assert reply.headers["x-edgetune-skipped-tools"] == "web_search_20250305"
