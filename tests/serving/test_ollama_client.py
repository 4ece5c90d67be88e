"""The `ollama` client against a running server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ollama
import pytest

from tests.serving.conftest import Running

ASK = [{"role": "user", "content": "dim the lights"}]
GREEDY = {"temperature": 0, "num_predict": 8}


@pytest.fixture
def client(live: Running) -> Iterator[Any]:
    with ollama.Client(host=live.url) as opened:
        yield opened


def test_a_chat_is_answered(client: Any, model: str) -> None:
    reply = client.chat(model=model, messages=ASK, options=GREEDY)
    assert reply.message.content
    assert reply.done_reason in ("stop", "length")
    assert reply.eval_count <= 9
    assert reply.total_duration >= reply.eval_duration


def test_a_stream_gives_the_text_of_the_whole_reply(client: Any, model: str) -> None:
    whole = client.chat(model=model, messages=ASK, options=GREEDY)
    parts = list(client.chat(model=model, messages=ASK, options=GREEDY, stream=True))
    assert "".join(part.message.content for part in parts) == whole.message.content
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]


def test_generate_continues_raw_text_and_answers_prompts(client: Any, model: str) -> None:
    raw = client.generate(model=model, prompt="dim the", raw=True, options=GREEDY)
    parts = client.generate(model=model, prompt="dim the", raw=True, options=GREEDY, stream=True)
    assert "".join(part.response for part in parts) == raw.response
    assert client.generate(model=model, prompt="dim the", system="Be brief.", options=GREEDY).response


def test_files_are_listed_and_shown(client: Any) -> None:
    listed = client.list().models
    assert [each.model for each in listed] == ["tiny:latest", "tiny-onnx:latest", "endless:latest"]
    assert [each.digest for each in listed] == [each.digest for each in client.list().models]
    assert all(each.size > 1000 for each in listed)
    assert [each.details.format for each in listed] == ["gguf", "onnx", "gguf"]
    assert (listed[0].details.family, listed[0].details.quantization_level) == ("qwen2", "F32")
    assert listed[0].details.parameter_size.endswith("K")
    shown = client.show("tiny:latest")
    assert "completion" in shown.capabilities
    assert "<|im_start|>" in shown.template
    assert shown.modelinfo["general.architecture"] == "qwen2"
    client.chat(model="tiny", messages=ASK, options={"num_predict": 1})
    assert "tiny:latest" in [each.model for each in client.ps().models]


def test_texts_are_embedded(client: Any) -> None:
    reply = client.embed(model="tiny", input=["dim the lights", "say hello"])
    assert len(reply.embeddings) == 2
    assert sum(value * value for value in reply.embeddings[0]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("change", [("pull", "x"), ("delete", "tiny"), ("copy", "tiny", "y"), ("create", "z")])
def test_files_are_not_changed(client: Any, change: tuple[str, ...]) -> None:
    with pytest.raises(ollama.ResponseError, match="only answers") as raised:
        getattr(client, change[0])(*change[1:])
    assert raised.value.status_code == 403


def test_an_error_has_ollamas_form(client: Any) -> None:
    with pytest.raises(ollama.ResponseError, match="there is no model 'none'") as raised:
        client.chat(model="none", messages=ASK)
    assert raised.value.status_code == 404


def test_the_older_endpoint_gives_the_embedding_of_one_text(client: Any) -> None:
    new = client.embed(model="tiny", input="dim the lights").embeddings[0]
    assert list(client.embeddings(model="tiny", prompt="dim the lights").embedding) == pytest.approx(list(new))
