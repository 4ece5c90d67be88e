"""Random requests that are nearly right: a sound body of each endpoint, changed in a few places."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from random import Random
from typing import Any

_USER = {"role": "user", "content": "dim the 灯 👍🏽"}
_LEVELS = {"type": "object", "properties": {"level": {"enum": ["low", "high"]}}, "required": ["level"]}
_DIM = {"name": "dim", "description": "Dim", "parameters": _LEVELS}
_MORE: dict[str, Any] = {
    "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3, "stop": ["x", "灯"], "n": 2, "stream": True,
    "logit_bias": {"5": -100, "7": 2.5}, "presence_penalty": 0.5, "repeat_penalty": 1.1, "typical_p": 0.9,
    "dry_multiplier": 0.8, "xtc_probability": 0.5, "stream_options": {"include_usage": True},
}  # fmt: skip
_CALL = {"id": "c1", "type": "function", "function": {"name": "dim", "arguments": '{"level": "low"}'}}
BODIES: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "/v1/chat/completions",
        {"messages": [{"role": "system", "content": "Be brief."}, _USER], "max_tokens": 5, **_MORE},
    ),
    (
        "/v1/chat/completions",
        {"messages": [_USER], "logprobs": True, "top_logprobs": 3, "max_completion_tokens": 4, "mirostat": 2},
    ),
    (
        "/v1/chat/completions",
        {
            "max_tokens": 6,
            "messages": [
                _USER,
                {"role": "assistant", "content": None, "tool_calls": [_CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "done"},
            ],
            "tools": [{"type": "function", "function": _DIM}],
            "tool_choice": "auto",
            "parallel_tool_calls": False,
            "stream": True,
        },
    ),
    (
        "/v1/chat/completions",
        {
            "max_tokens": 6,
            "messages": [_USER],
            "tools": [{"type": "function", "function": _DIM}],
            "tool_choice": {"type": "function", "function": {"name": "dim"}},
        },
    ),
    (
        "/v1/chat/completions",
        {
            "max_tokens": 40,
            "messages": [_USER, {"role": "assistant", "content": "The"}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": _LEVELS, "strict": True}},
        },
    ),
    ("/v1/completions", {"prompt": "dim the", "max_tokens": 3, "echo": True, "logprobs": 2, **_MORE}),
    ("/v1/completions", {"prompt": [[5, 6, 7], [8]], "max_tokens": 0, "echo": True, "logprobs": 1}),
    ("/v1/completions", {"prompt": ["a", "b", "c"], "max_tokens": 2, "best_of": 1, "suffix": None, "user": "u"}),
    (
        "/v1/responses",
        {
            "input": [
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "dim"}]},
                {"type": "function_call", "call_id": "c", "name": "dim", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "done"},
            ],
            "tools": [{"type": "function", **_DIM}, {"type": "web_search"}],
            "tool_choice": "required",
            "reasoning": {"effort": "low"},
            "store": False,
            "stream": True,
            "max_output_tokens": 4,
            "instructions": "Be brief.",
            "include": [],
            "prompt_cache_key": "k",
        },
    ),
    (
        "/v1/responses",
        {
            "input": "dim",
            "max_output_tokens": 40,
            "text": {"format": {"type": "json_schema", "name": "x", "schema": _LEVELS}},
        },
    ),
    (
        "/v1/messages",
        {
            "max_tokens": 4,
            "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
            "messages": [
                _USER,
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "hm", "signature": ""},
                        {"type": "tool_use", "id": "t", "name": "dim", "input": {"level": "low"}},
                    ],
                },
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "done"}]},
            ],
            "tools": [{"name": "dim", "input_schema": _LEVELS}],
            "tool_choice": {"type": "any"},
            "stream": True,
            "thinking": {"type": "enabled", "budget_tokens": 100},
            "stop_sequences": ["x"],
            "metadata": {"user_id": "u"},
        },
    ),
    ("/v1/messages/count_tokens", {"messages": [_USER], "system": "Be brief."}),
    (
        "/api/chat",
        {
            "messages": [_USER],
            "options": {"num_predict": 3, "temperature": 0},
            "stream": False,
            "tools": [{"type": "function", "function": _DIM}],
            "think": True,
            "keep_alive": "5m",
        },
    ),
    (
        "/api/chat",
        {
            "messages": [{**_USER, "images": []}],
            "format": _LEVELS,
            "options": {"stop": ["x"], "seed": 1, "num_predict": 40},
        },
    ),
    (
        "/api/generate",
        {"prompt": "dim", "system": "Be brief.", "format": "json", "options": {"num_ctx": 64, "num_predict": 9}},
    ),
    ("/api/generate", {"prompt": "dim", "raw": True, "options": {"top_k": 3, "num_predict": 5}, "context": []}),
    ("/api/embed", {"input": ["dim", "lights"], "truncate": True, "dimensions": 4}),
    ("/api/show", {"model": "tiny", "verbose": False}),
    ("/v1/embeddings", {"input": ["dim", "x"], "encoding_format": "base64", "dimensions": 8}),
    ("/v1/embeddings", {"input": [[5, 6], [7]]}),
    ("/tokenize", {"content": "dim 灯", "add_special": False, "with_pieces": True}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
    (
        "/apply-template",
        {"messages": [_USER], "tools": [{"type": "function", "function": _DIM}], "chat_template_kwargs": {}},
    ),
)
_PATHS = ("/v1/models", "/v1/models/tiny", "/api/tags", "/api/ps", "/api/version", "/health", "/metrics", "/nothing")
_MODELS = ("tiny",) * 8 + ("tiny-onnx",) * 4 + ("tiny:latest", "none", "", None)
_DEEP: Any = [[[[[[[[[[{"a": [{}]}]]]]]]]]]]
_JUNK: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 499, 10**4, 2**31, 2**63, 2**70, 0.5, -0.5, 1e308, -1e-300, "", " ", "x", "dim",
    "\x00", "\ud83d", "👍🏽", "\ufffd", "<|im_end|>", "<|im_start|>user\n", "<tool_call>", "</think>", '{"a":1}',
    "null", "[TOOL_CALLS]", "x" * 300, "灯" * 200, [], {}, [[]], [{}], {"a": 1}, _DEEP, "user", "system", "tool",
    "assistant", "required", "json", "text", "function", {"$ref": "#"}, {"$ref": "#/$defs/a"},
    {"type": "string", "pattern": "^(a+)+$"}, {"type": "string", "minLength": 10**6},
    {"type": "array", "items": {"$ref": "#"}}, {"not": {}}, {"enum": []},
    {"anyOf": [{"$ref": "#"}, {"type": "integer", "maximum": 10**30}]}, ["a", 1], [5, 6], [[5], [2**40]], ["a", "b"],
)  # fmt: skip


_DAMAGE = (b"\xff", b"\xed\xa0\x80", b"\x00", b"\xf0\x9f", b"\\ud83d", b"}", b'"')


@dataclass
class FuzzRequest:
    """A request, and how its client behaves."""

    method: str
    path: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    pieces: int = 1
    """In how many pieces the body arrives."""
    gone_after: int | None = None
    """How many messages of the reply the client takes before it goes away; -1: in the middle of the body."""
    is_slow: bool = False


def random_request(random: Random) -> FuzzRequest:
    """Return a request."""
    if random.random() < 0.03:
        return FuzzRequest(random.choice(("GET", "HEAD", "PUT", "DELETE")), random.choice(_PATHS), b"")
    path, sound = random.choice(BODIES)
    body = copy.deepcopy(sound)
    body.setdefault("model", random.choice(_MODELS))
    for _ in range(random.choice((0, 0, 1, 1, 1, 2, 2, 3, 6))):
        _change(random, body)
    raw = json.dumps(body, ensure_ascii=random.random() < 0.9).encode("utf-8", "surrogatepass")
    if random.random() < 0.06:
        raw = _damage(random, raw)
    if random.random() < 0.02:
        path = random.choice([each for each, _ in BODIES])
    request = FuzzRequest("POST", path, raw, pieces=random.choice((1, 1, 1, 2, 5)), is_slow=random.random() < 0.02)
    if random.random() < 0.02:
        request.headers = random.choice(({"host": "evil.example"}, {"origin": "https://evil.example"}))
    if random.random() < 0.08:
        request.gone_after = random.choice((-1, 0, 0, 1, 2, 3, 5))
    return request


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return all (container, key) pairs below a value."""
    found, waiting = [], [value]
    while waiting:
        each = waiting.pop()
        keys = list(each) if isinstance(each, dict) else range(len(each)) if isinstance(each, list) else ()
        for key in keys:
            found.append((each, key))
            waiting.append(each[key])
    return found


def _change(random: Random, body: dict[str, Any]) -> None:
    """Change one place of a body."""
    places = _places(body)
    if not places:
        return
    container, key = random.choice(places)
    match random.randrange(7):
        case 0 | 1:
            container[key] = copy.deepcopy(random.choice(_JUNK))
        case 2:
            del container[key]
        case 3:
            _, other = random.choice(BODIES)
            name = random.choice(list(other))
            body[name] = copy.deepcopy(other[name])
        case 4:
            container[key] = random.choice(([container[key]], {"text": container[key]}))
        case 5:
            other, place = random.choice(places)
            if place in other if isinstance(other, dict) else place < len(other):
                container[key] = copy.deepcopy(other[place])
        case 6:
            if isinstance(container, list):
                container.insert(key, copy.deepcopy(container[key]))
            else:
                container[str(key) + random.choice(("", "s", "\n", "灯"))] = copy.deepcopy(random.choice(_JUNK))


def _damage(random: Random, raw: bytes) -> bytes:
    at = random.randrange(len(raw) + 1)
    match random.randrange(4):
        case 0:
            return raw[:at]
        case 1:
            return raw[:at] + random.choice(_DAMAGE) + raw[at:]
        case 2:
            return raw[:at] + bytes([random.randrange(256)]) + raw[at + 1 :]
    return raw + raw[:at]
