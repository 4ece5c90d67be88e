"""The `openai` client against a running server."""

from __future__ import annotations

from typing import Any

ASK = [{"role": "user", "content": "dim the lights"}]


def test_a_chat_is_answered(client: Any, model: str) -> None:
    reply = client.chat.completions.create(model=model, messages=ASK, max_tokens=8, temperature=0)
    assert reply.choices[0].message.content
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.usage is not None
    assert reply.usage.completion_tokens <= 8


def test_a_stream_gives_the_text_of_the_whole_reply(client: Any, model: str) -> None:
    whole = client.chat.completions.create(model=model, messages=ASK, max_tokens=8, temperature=0)
    stream = client.chat.completions.create(model=model, messages=ASK, max_tokens=8, temperature=0, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(chunk.usage is None for chunk in chunks)


def test_a_refusal_of_an_earlier_answer_is_text(client: Any) -> None:
    def tokens(message: dict[str, Any]) -> int:
        talk = [*ASK, {"role": "assistant", **message}, *ASK]
        reply = client.chat.completions.create(model="tiny", messages=talk, max_tokens=1)
        count: int = reply.usage.prompt_tokens
        return count

    expected = tokens({"content": "I cannot do that."})
    assert tokens({"content": None, "refusal": "I cannot do that."}) == expected
    assert tokens({"content": [{"type": "refusal", "refusal": "I cannot do that."}]}) == expected
