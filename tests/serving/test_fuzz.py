"""Structured fuzzing: whatever is sent, a reply of the dialect comes, nothing crashes, no slot is leaked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serving.conftest import Running
from tests.serving.test_access import wait_until_idle

MODELS = st.sampled_from(["tiny", "tiny-onnx", "endless", "tiny:latest", "none", "", None, 5])
TEXT = st.text(max_size=12) | st.sampled_from(
    ["dim", "灯👍🏽", "<|im_end|>", "<tool_call>", '{"a":1}', "\x00", "[TOOL_CALLS]"]
)
SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | TEXT
JUNK = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)
SCHEMAS = JUNK | st.sampled_from([
    {"type": "object"}, {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]},
    {"$ref": "#"}, {"$ref": "#/x"}, {"type": "string", "maxLength": 3}, {"anyOf": [{"$ref": "#"}]}, {}, True,
])  # fmt: skip
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "input_text", "tool_use", "tool_result", "thinking", "image", "x"])},
    optional={"text": TEXT, "name": TEXT, "input": JUNK, "tool_use_id": TEXT, "content": TEXT, "thinking": TEXT},
)
CONTENT = TEXT | st.lists(PARTS, max_size=3) | st.none() | JUNK
CALLED = st.fixed_dictionaries({"name": TEXT, "arguments": TEXT | JUNK})
CALLS = st.lists(st.fixed_dictionaries({"function": CALLED}, optional={"id": TEXT}), max_size=2)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "robot"])},
        optional={"content": CONTENT, "tool_calls": CALLS, "tool_call_id": TEXT, "name": TEXT, "type": TEXT},
    ),
    max_size=4,
)
FUNCTION = st.fixed_dictionaries({"name": TEXT}, optional={"parameters": SCHEMAS, "description": TEXT})
TOOL = {
    "type": st.sampled_from(["function", "x"]), "function": FUNCTION, "name": TEXT, "input_schema": SCHEMAS,
    "parameters": SCHEMAS,
}  # fmt: skip
TOOLS = st.lists(st.fixed_dictionaries({}, optional=TOOL), max_size=2)
NUMBERS = SCALARS | st.floats(0, 2) | st.integers(0, 5)
FORMATS = st.sampled_from(["json", "", "text"]) | st.builds(
    lambda kind, schema: {"type": kind, "json_schema": {"schema": schema}, "schema": schema},
    st.sampled_from(["text", "json_object", "json_schema", "x"]), SCHEMAS,
)  # fmt: skip
OPTIONAL: dict[str, st.SearchStrategy[Any]] = {
    "stream": st.booleans(), "temperature": NUMBERS, "top_p": NUMBERS, "top_k": NUMBERS, "min_p": NUMBERS,
    "seed": NUMBERS, "n": st.integers(-1, 3), "stop": TEXT | st.lists(TEXT, max_size=3), "logprobs": NUMBERS,
    "top_logprobs": NUMBERS, "logit_bias": st.dictionaries(st.integers(-1, 600).map(str), NUMBERS, max_size=3),
    "presence_penalty": NUMBERS, "repeat_penalty": NUMBERS, "typical_p": NUMBERS, "mirostat": st.integers(-1, 3),
    "tools": TOOLS, "tool_choice": st.sampled_from(["none", "auto", "required"]) | JUNK, "response_format": FORMATS,
    "format": FORMATS, "echo": st.booleans(), "system": CONTENT, "instructions": TEXT, "options": JUNK,
    "chat_template_kwargs": JUNK, "stop_sequences": st.lists(TEXT, max_size=2), "stream_options": JUNK,
    "thinking": JUNK, "dimensions": NUMBERS, "encoding_format": TEXT, "raw": st.booleans(), "surprise": JUNK,
    "text": st.builds(lambda form: {"format": form}, FORMATS), "reasoning": JUNK, "think": SCALARS,
    "parallel_tool_calls": st.booleans(), "suffix": TEXT, "best_of": NUMBERS, "n_probs": NUMBERS,
}  # fmt: skip
IDS = st.lists(st.integers(-1, 600), max_size=4)
INPUTS = TEXT | IDS | st.lists(TEXT, max_size=3) | st.lists(IDS, max_size=3) | JUNK
BODIES = st.fixed_dictionaries(
    {
        "model": MODELS, "messages": MESSAGES | JUNK, "prompt": INPUTS, "input": INPUTS | MESSAGES, "content": TEXT,
        "tokens": IDS,
    },
    optional=OPTIONAL,
)  # fmt: skip
PATHS = st.sampled_from([
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/messages",
    "/v1/messages/count_tokens", "/api/chat", "/api/generate", "/api/embed", "/api/show", "/tokenize", "/detokenize",
    "/apply-template",
])  # fmt: skip
LIMITS = {"max_tokens": 3, "max_output_tokens": 3, "max_completion_tokens": 3}


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=60) as client:
        yield client


@given(path=PATHS, body=BODIES, drop=st.sets(st.sampled_from(["model", "messages", "prompt", "input"]), max_size=1))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
def test_whatever_is_sent_is_answered(
    live: Running, http: httpx.Client, path: str, body: dict[str, Any], drop: set[str]
) -> None:
    sent = {key: value for key, value in body.items() if key not in drop} | LIMITS
    if path.startswith("/api/"):
        sent["options"] = {"num_predict": 3}
    content = json.dumps(sent).encode()
    reply = http.post(live.url + path, content=content)
    assert reply.status_code in (200, 400, 403, 404) or is_invalid_output(reply), reply.text
    if reply.status_code != 200:
        assert reply.json()["error"]
    elif "json" in reply.headers["content-type"].split("/")[1].split(";")[0].split("-")[0]:
        assert reply.json() is not None
    assert http.get(live.url + "/health").json()["status"] == "ok"


def is_invalid_output(reply: httpx.Response) -> bool:
    """Whether the model's answer does not match its schema, which is its fault."""
    return reply.status_code == 500 and "the answer" in reply.text


SOUND_MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXT})
SOUND = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["tiny", "tiny-onnx", "endless"]),
        "messages": st.lists(SOUND_MESSAGE, min_size=1, max_size=4),
        "prompt": TEXT | st.lists(st.integers(0, 400), min_size=1, max_size=4),
        "input": TEXT,
    },
    optional={
        "stream": st.booleans(), "temperature": st.floats(0, 2), "top_p": st.floats(0, 1), "top_k": st.integers(0, 50),
        "min_p": st.floats(0, 1), "seed": st.integers(-(2**64), 2**64), "n": st.integers(1, 3), "stop": TEXT,
        "logit_bias": st.dictionaries(st.integers(0, 400).map(str), st.floats(-100, 100), max_size=2),
        "presence_penalty": st.floats(-2, 2), "frequency_penalty": st.floats(-2, 2), "echo": st.booleans(),
        "repeat_penalty": st.floats(0.5, 2), "typical_p": st.floats(0, 1), "xtc_probability": st.floats(0, 1),
        "dry_multiplier": st.floats(0, 2), "mirostat": st.sampled_from([0, 0, 1, 2]),
    },
)  # fmt: skip


@given(path=st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"]), body=SOUND)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
def test_sound_requests_are_answered(live: Running, http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    sent = {key: value for key, value in body.items() if key != "prompt" or path != "/v1/responses"}  # a template there
    reply = http.post(live.url + path, content=json.dumps(sent | LIMITS).encode())
    if reply.status_code != 200:  # fields that exclude one another, a prompt without tokens
        assert reply.status_code == 400
        assert "mirostat" in body or not body["prompt"], reply.text
        return
    assert '"error":{' not in reply.text.replace('"error":null', "")


@given(body=st.binary(max_size=40) | JUNK.map(lambda value: json.dumps(value).encode()), path=PATHS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_bytes_are_answered(live: Running, http: httpx.Client, body: bytes, path: str) -> None:
    reply = http.post(live.url + path, content=body)
    is_empty = reply.status_code == 200 and path in ("/api/generate", "/v1/responses", "/api/chat")
    assert 400 <= reply.status_code < 500 or is_empty, reply.text


def test_no_slot_is_leaked(live: Running) -> None:
    wait_until_idle(live)
