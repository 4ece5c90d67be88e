"""Bad requests: one error object in the dialect of the endpoint, with the field's name; unknown fields are named."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.serving.conftest import Running

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "dim the lights"}], "max_tokens": 2}
CHAT = "/v1/chat/completions"


def post(live: Running, path: str, body: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(live.url + path, content=content, timeout=60)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"stop": [1]}, "stop.0"),
        ({"stop": [""]}, "stop.0"),
        ({"seed": "x"}, "seed"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"1": 500}}, "logit_bias.1"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0.type",
        ),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"functions": []}, "functions"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"chat_template_kwargs": {"nothing": 1}}, "chat_template_kwargs"),
        ({"mirostat": 2, "top_k": 5}, "mirostat"),
        ({"model": "none"}, "model"),
        ({"model": None}, "model"),
    ],
)
def test_a_wrong_field_is_named(live: Running, change: dict[str, Any], field: str) -> None:
    reply = post(live, CHAT, ASK | change)
    assert reply.status_code == (404 if change.get("model") else 400), reply.text
    error = reply.json()["error"]
    assert error["param"] == field
    assert error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b"\xff\xfe",
        b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
        b"NaN",
        b"[" * 5000,
    ],
)
def test_a_body_that_is_no_request_is_an_error(live: Running, body: bytes) -> None:
    for path in (CHAT, "/v1/completions", "/v1/messages", "/api/chat", "/tokenize", "/v1/embeddings", "/v1/responses"):
        reply = post(live, path, body)
        assert 400 <= reply.status_code < 500, (path, reply.text)
        assert "error" in reply.json()


def test_a_number_that_is_none_is_refused(live: Running) -> None:
    reply = post(live, CHAT, json.dumps(ASK | {"temperature": float("nan")}).encode())
    assert reply.status_code == 400


def test_unknown_fields_are_named_in_a_header(live: Running) -> None:
    body = ASK | {"surprise": 1, "messages": [{"role": "user", "content": "x", "mood": "good"}]}
    reply = post(live, CHAT, body)
    assert reply.status_code == 200
    assert reply.headers["x-edgetune-ignored-fields"] == "surprise, messages.0.mood"


def test_an_unknown_field_cannot_break_the_header(live: Running) -> None:
    reply = post(live, CHAT, ASK | {"a\r\nb: c": 1, "灯": 2, "x" * 5000: 3})
    assert reply.status_code == 200
    assert "b" not in reply.headers


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", CHAT, 405), ("PUT", "/v1/models", 405), ("GET", "/nothing", 404), ("POST", "/api/nothing", 404)],
)
def test_a_path_that_is_not_there_is_an_error(live: Running, method: str, path: str, status: int) -> None:
    reply = httpx.request(method, live.url + path)
    assert reply.status_code == status
    assert reply.json()["error"]


def test_a_prompt_that_fills_the_context_is_answered_and_one_more_token_is_refused(live: Running) -> None:
    full = {"model": "tiny", "prompt": [20] * 1023, "max_tokens": 50}
    reply = post(live, "/v1/completions", full).json()
    assert reply["usage"]["completion_tokens"] <= 2
    too_long = post(live, "/v1/completions", full | {"prompt": [20] * 1024})
    assert too_long.status_code == 400
    assert too_long.json()["error"]["code"] == "context_length_exceeded"


def test_only_one_usage_chunk_comes_and_only_when_asked(live: Running) -> None:
    for options, count in ({}, 0), ({"stream_options": {"include_usage": True}}, 1):
        text = post(live, CHAT, {**ASK, "stream": True, **options}).text
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        assert sum(bool(chunk.get("usage")) for chunk in chunks) == count
        assert text.endswith("data: [DONE]\n\n")


def test_log_probabilities_of_a_chat_are_those_of_its_tokens(live: Running) -> None:
    body = ASK | {"logprobs": True, "top_logprobs": 3, "temperature": 0, "model": "endless", "max_tokens": 6}
    choice = post(live, CHAT, body).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 6
    assert (
        bytes(byte for each in content for byte in each["bytes"]).decode("utf-8", "replace")
        == choice["message"]["content"]
    )
    for each in content:
        assert each["top_logprobs"][0]["logprob"] == each["logprob"]
        assert len(each["top_logprobs"]) == 3


def test_several_choices_come_in_one_stream(live: Running) -> None:
    body = ASK | {"n": 3, "stream": True, "seed": 1, "model": "endless", "max_tokens": 5}
    text = post(live, CHAT, body).text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    streamed = ["", "", ""]
    for chunk in chunks:
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content", "")
    whole = post(live, CHAT, body | {"stream": False}).json()["choices"]
    assert streamed == [choice["message"]["content"] for choice in whole]


def test_tokens_and_templates_are_shown(live: Running) -> None:
    text = "dim 灯 👍🏽"
    tokens = post(live, "/tokenize", {"model": "tiny", "content": text}).json()["tokens"]
    assert post(live, "/detokenize", {"model": "tiny", "tokens": tokens}).json()["content"] == text
    prompt = post(live, "/apply-template", {"model": "tiny", "messages": ASK["messages"]}).json()["prompt"]
    assert prompt == "<|im_start|>user\ndim the lights<|im_end|>\n<|im_start|>assistant\n"
    assert post(live, "/detokenize", {"model": "tiny", "tokens": [10**6]}).json()["error"]["param"] == "tokens.0"


def test_the_address_itself_says_what_runs_there(live: Running) -> None:
    reply = httpx.get(live.url)
    assert "is running" in reply.text
    assert httpx.head(live.url).status_code == 200


def test_metrics_count_requests_and_tokens(live: Running) -> None:
    post(live, CHAT, ASK)
    text = httpx.get(live.url + "/metrics").text
    assert 'edgetune_requests_total{route="/v1/chat/completions",status="200"}' in text
    assert 'edgetune_tokens_total{kind="generated"}' in text
    assert "edgetune_active_requests 1" in text
    assert all(f"edgetune_{name}_total{{model=" in text for name in ("drafted_tokens", "guessed_tokens", "near_ties"))


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/responses", {"input": "dim " * 2000}, "input"),
        ("/api/generate", {"prompt": "dim " * 2000}, "prompt"),
        ("/v1/completions", {"prompt": "dim " * 2000}, "prompt"),
        ("/api/chat", {"messages": ASK["messages"], "options": {"mirostat": 1, "top_p": 0.5}}, "options.mirostat"),
        ("/api/chat", {"messages": ASK["messages"], "options": {"logit_bias": {"x": 1}}}, "options.logit_bias.x"),
    ],
)
def test_a_field_has_the_name_that_its_dialect_gives_it(live: Running, path: str, body: Any, field: str) -> None:
    reply = post(live, path, {"model": "tiny", **body})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (reply.json() if path.startswith("/api/") else error)["param"] == field
