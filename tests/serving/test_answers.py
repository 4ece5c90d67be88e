"""The text of answers: characters over several tokens, reasoning apart, stop strings, full contexts."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.runtime import models
from tests.serving.conftest import Running, openai_client
from tests.serving.scripted import scripted

ASK = [{"role": "user", "content": "dim the lights"}]
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template knows reasoning."""
    folder = tmp_path_factory.mktemp("thinker")
    base = models.base(folder / "hf", max_position_embeddings=1024)
    (base / "chat_template.jinja").write_text(THINKING)
    return models.gguf(base, folder / "tiny.gguf")


def pieces(server: Running, **options: Any) -> list[Any]:
    with openai_client(server) as client:
        chunks = list(client.chat.completions.create(model="tiny", messages=ASK, stream=True, **options))
    return [choice.delta for chunk in chunks for choice in chunk.choices]


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_characters_over_several_tokens_come_whole(file: Path, width: int) -> None:
    text = "灯 👍🏽 é end"
    with scripted(file, text, text, width=width) as (server, _):
        deltas = [delta.content for delta in pieces(server) if delta.content]
        raw = httpx.post(server.v1 + "/completions", json={"prompt": "x", "stream": True, "max_tokens": 99}).text
    assert "".join(deltas) == text
    assert not any("\ufffd" in delta for delta in deltas)
    events = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == text


def test_bytes_that_are_no_text_are_replaced(file: Path) -> None:
    with scripted(file, b"a\xff\xf0\x9f b\xed\xa0\x80", width=1) as (server, _):
        text = "".join(delta.content or "" for delta in pieces(server))
    assert text == b"a\xff\xf0\x9f b\xed\xa0\x80".decode("utf-8", "replace")


@pytest.mark.parametrize("width", [1, 4, 100])
def test_a_stop_string_over_several_tokens_ends_the_answer_before_it(file: Path, width: int) -> None:
    with scripted(file, "one END two", "one EN", width=width) as (server, _):
        first = "".join(delta.content or "" for delta in pieces(server, stop=["END", "never"]))
        second = "".join(delta.content or "" for delta in pieces(server, stop="END"))
    assert (first, second) == ("one ", "one EN")


def test_reasoning_is_apart_in_every_dialect(thinker: Path) -> None:
    answer = "<think>\nhm STOP\n</think>\n\nyes"
    with scripted(thinker, *[answer] * 5) as (server, _):
        chat = {"messages": ASK, "max_tokens": 99, "stop": ["STOP"]}
        message = httpx.post(server.v1 + "/chat/completions", json=chat).json()["choices"][0]["message"]
        assert (message["reasoning_content"].strip(), message["content"]) == ("hm STOP", "yes")
        blocks = httpx.post(server.v1 + "/messages", json={"messages": ASK, "max_tokens": 99}).json()["content"]
        assert [block["type"] for block in blocks] == ["thinking", "text"]
        items = httpx.post(server.v1 + "/responses", json={"input": "x"}).json()["output"]
        assert [item["type"] for item in items] == ["reasoning", "message"]
        said = httpx.post(server.url + "/api/chat", json={"messages": ASK, "stream": False}).json()["message"]
        assert (said["thinking"].strip(), said["content"]) == ("hm STOP", "yes")
        events = httpx.post(server.v1 + "/messages", json={"messages": ASK, "max_tokens": 99, "stream": True}).text
        assert events.index("thinking_delta") < events.index("text_delta")


def test_a_schema_leaves_no_room_for_reasoning(thinker: Path) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1]}}}
    with scripted(thinker, "1") as (server, seen), openai_client(server) as client:
        reply = client.chat.completions.create(model="tiny", messages=ASK, response_format=form)
    assert reply.choices[0].message.content == "1"
    assert seen[0].grammar.kind == "json_schema"


def test_a_prefill_is_the_end_of_the_prompt(file: Path) -> None:
    with scripted(file, " on") as (server, seen), openai_client(server) as client:
        messages = [*ASK, {"role": "assistant", "content": "The light is"}]
        reply = client.chat.completions.create(model="tiny", messages=messages)
        text = httpx.post(server.url + "/detokenize", json={"tokens": list(seen[0].ids)}).json()["content"]
    assert reply.choices[0].message.content == " on"
    assert text.endswith("<|im_start|>assistant\nThe light is")


def test_requests_that_fill_the_context_together_are_all_answered(live: Running) -> None:
    async def both() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=120) as client:
            body = {"model": "tiny", "prompt": [20] * 1000, "max_tokens": 500, "temperature": 0}
            return await asyncio.gather(*(client.post(live.v1 + "/completions", json=body) for _ in range(6)))

    replies = [reply.json() for reply in asyncio.run(both())]
    assert len({reply["choices"][0]["text"] for reply in replies}) == 1
    assert all(reply["usage"]["total_tokens"] <= 1025 for reply in replies)


def test_an_exact_answer_does_not_depend_on_other_requests(endless: Path) -> None:
    from tests.serving.conftest import running

    body = {"prompt": "dim the bedroom lights", "max_tokens": 12, "temperature": 0, "logprobs": 2}

    async def crowd(url: str) -> list[Any]:
        async with httpx.AsyncClient(timeout=120) as client:
            others = [client.post(url, json={**body, "prompt": f"dim the {n}"}) for n in range(4)]
            replies = await asyncio.gather(client.post(url, json=body), *others, client.post(url, json=body))
            return [replies[0].json()["choices"], replies[-1].json()["choices"]]

    with running(endless, is_exact=True) as server:
        alone = httpx.post(server.v1 + "/completions", json=body, timeout=60).json()["choices"]
        assert asyncio.run(crowd(server.v1 + "/completions")) == [alone, alone]
