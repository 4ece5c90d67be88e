"""Completions: echo with log-probabilities, ids, batches, streams."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from edgetune.runtime import load

TEXT = "dim the bedroom lights, 把卧室的灯调暗 and say 👍🏽"


@pytest.fixture
def expected(request: pytest.FixtureRequest, model: str) -> tuple[list[int], list[float], list[bytes]]:
    """Ids of the text, their log-probabilities by the runtime's own scores, and their bytes."""
    path = request.getfixturevalue({"tiny": "file", "tiny-onnx": "folder"}[model])
    with load(path) as runtime:
        ids = runtime.tokenize(TEXT)
        rows = np.concatenate(
            [block.astype(np.float64) for block in runtime.score(np.array(ids, np.int32), np.arange(1, len(ids)))]
        )
        scores = [float(row[id_] - np.logaddexp.reduce(row)) for row, id_ in zip(rows, ids[1:], strict=True)]
        return ids, scores, [runtime.token_bytes(id_, special=True) for id_ in ids]


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("as_ids", [False, True])
def test_echo_gives_each_token_its_own_log_probability(
    client: Any, model: str, expected: Any, max_tokens: int, as_ids: bool
) -> None:
    ids, scores, _ = expected
    reply = client.completions.create(
        model=model, prompt=ids if as_ids else TEXT, echo=True, logprobs=2, max_tokens=max_tokens, temperature=0
    )
    found = reply.choices[0].logprobs
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    assert found.token_logprobs[1 : len(ids)] == pytest.approx(scores, abs=2e-4)
    assert reply.choices[0].text.startswith(TEXT)
    for token, logprob, top in list(zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True))[1:]:
        assert top[token] == logprob
        assert max(top.values()) >= logprob
    if max_tokens:
        assert len(found.tokens) - len(ids) in range(1, max_tokens + 2)
        assert found.token_logprobs[len(ids)] == max(found.top_logprobs[len(ids)].values())


def test_offsets_are_those_of_the_tokens_in_the_text(client: Any, model: str, expected: Any) -> None:
    _, _, raw = expected
    reply = client.completions.create(model=model, prompt=TEXT, echo=True, logprobs=0, max_tokens=0)
    found = reply.choices[0].logprobs
    whole = b"".join(raw)
    at = 0
    for offset, piece in zip(found.text_offset, raw, strict=True):
        assert offset == len(whole[:at].decode("utf-8", "ignore"))
        at += len(piece)


def test_a_part_of_a_character_is_named_by_its_bytes(client: Any, model: str) -> None:
    reply = client.completions.create(model=model, prompt="👍", echo=True, logprobs=0, max_tokens=0)
    tokens = reply.choices[0].logprobs.tokens
    raw = b"".join(
        bytes.fromhex(token[6:].replace("\\x", "")) if token.startswith("bytes:") else token.encode()
        for token in tokens
    )
    assert raw.decode() == "👍"


def test_a_batch_gives_what_its_prompts_give_alone(client: Any, model: str) -> None:
    prompts = ["dim the lights", "say hello", TEXT] * 30
    options = {"model": model, "max_tokens": 4, "temperature": 0}
    alone = [client.completions.create(prompt=prompt, **options).choices[0].text for prompt in prompts[:3]]
    choices = client.completions.create(prompt=prompts, **options).choices
    assert [choice.index for choice in choices] == list(range(90))
    assert [choice.text for choice in choices] == alone * 30


def test_a_stream_gives_the_text_of_the_whole_reply(client: Any, model: str) -> None:
    options = {"model": model, "prompt": TEXT, "max_tokens": 8, "temperature": 0, "echo": True}
    whole = client.completions.create(**options).choices[0]
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.text
    assert chunks[-1].usage.completion_tokens <= 9
    assert chunks[-2].choices[0].finish_reason == whole.finish_reason


def test_log_probabilities_of_the_answer_are_those_of_its_scores(client: Any, model: str) -> None:
    options = {"model": model, "prompt": TEXT, "max_tokens": 3, "temperature": 0, "logprobs": 1}
    alone = client.completions.create(**options).choices[0].logprobs
    echoed = client.completions.create(**options, echo=True).choices[0].logprobs
    count = len(alone.tokens)
    start = len(echoed.tokens) - count - (echoed.tokens[-1] == "<|im_end|>" and alone.tokens[-1:] != ["<|im_end|>"])
    assert echoed.tokens[start : start + count] == alone.tokens
    assert echoed.token_logprobs[start : start + count] == pytest.approx(alone.token_logprobs, abs=1e-3)


def test_samples_of_one_seed_are_equal_and_those_of_several_choices_differ(client: Any) -> None:
    options = {"model": "endless", "prompt": TEXT, "max_tokens": 12, "seed": -5, "n": 3}
    first = [choice.text for choice in client.completions.create(**options).choices]
    assert first == [choice.text for choice in client.completions.create(**options).choices]
    assert len(set(first)) > 1


def test_logit_bias_excludes_a_token(client: Any) -> None:
    options = {"model": "endless", "prompt": TEXT, "max_tokens": 1, "temperature": 0}
    first = client.completions.create(**options, logprobs=2).choices[0].logprobs
    with_bias = client.completions.create(**options, logprobs=2, logit_bias={str(id_): -100 for id_ in range(500)})
    assert with_bias.choices[0].logprobs.tokens != first.tokens
    assert math.isfinite(with_bias.choices[0].logprobs.token_logprobs[0])


def test_embeddings_are_floats_or_base64_and_can_be_cut(client: Any) -> None:
    options = {"model": "tiny", "input": ["dim the lights", "x"]}
    floats = client.embeddings.create(**options, encoding_format="float").data
    encoded = client.embeddings.create(**options).data  # the client asks for base64 and decodes it
    cut = client.embeddings.create(**options, dimensions=8).data
    assert encoded[0].embedding == pytest.approx(floats[0].embedding, abs=1e-6)
    assert len(cut[1].embedding) == 8
    assert np.linalg.norm(cut[1].embedding) == pytest.approx(1, abs=1e-5)
