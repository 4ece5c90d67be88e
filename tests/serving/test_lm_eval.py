"""lm-evaluation-harness over HTTP gives the figures of its own class for transformers models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tenacity", reason="the harness needs it for servers")

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.runtime import models
from tests.serving.conftest import Running, running
from tests.training import runs

CONTEXT = 96
PAIRS = [
    ("lamp 7 blue?", " blue"),
    ("lamp 7 blue?", " green"),
    ("lamp 7 blue? ", "white and more words"),
    ("<|im_start|>user\nlamp<|im_end|>\n", "red<|im_end|>"),
    ("把卧室的灯调暗", "好的"),
    ("a", " 👍🏽 b"),
    ("word " * 90, "the context is cut on the left"),
]
TEXTS = ["one short text", " ".join(f"lamp {number}" for number in range(90)), "x"]
PROMPTS = ["lamp 3 white?", "lamp 4 red?\nwhite\n", "a b c d e f g h"]
UNTIL = {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False}


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=0, metadata=("a task", number, 1))
        for number, each in enumerate(arguments)
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the usual size: with those of `models.base` the f16 cache moves log-probabilities by 1e-3."""
    return runs.make_base(tmp_path_factory.mktemp("harness") / "hf", "float32")


@pytest.fixture(scope="module")
def live(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("harness")
    with running(models.gguf(base, folder / "f32.gguf"), models.onnx(base, folder / "f32-onnx")) as server:
        yield server


@pytest.fixture(scope="module")
def expected(base: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return HFLM(model, tokenizer=AutoTokenizer.from_pretrained(base), max_length=CONTEXT, device="cpu")


@pytest.fixture(params=["f32", "f32-onnx"])
def ours(request: pytest.FixtureRequest, live: Running, base: Path) -> Any:
    return LocalCompletionsAPI(
        base_url=live.v1 + "/completions", model=request.param, tokenizer=str(base), tokenizer_backend="huggingface",
        max_length=CONTEXT + 2, batch_size=4, max_retries=1, num_concurrent=1,
    )  # fmt: skip


def assert_close(found: list[float], wanted: list[float], counts: list[int]) -> None:
    """Compare by token: llama.cpp's cache holds keys and values in f16, which moves a log-probability by up to 1e-4."""
    changes = np.abs(np.subtract(found, wanted)) / counts
    assert changes.max() < 1e-4, changes


def test_log_likelihoods_and_greedy_flags_are_those_of_the_hf_backend(ours: Any, expected: Any) -> None:
    asked = requests("loglikelihood", PAIRS)
    found, wanted = ours.loglikelihood(asked, disable_tqdm=True), expected.loglikelihood(asked, disable_tqdm=True)
    counts = [len(expected._encode_pair(*pair)[1]) for pair in PAIRS]
    assert_close([each[0] for each in found], [each[0] for each in wanted], counts)
    assert [each[1] for each in found] == [each[1] for each in wanted]


def test_a_greedy_continuation_is_recognized(ours: Any, expected: Any) -> None:
    prompt = "lamp 7 blue?"
    ids = torch.tensor([expected.tok_encode(prompt)])
    answer = expected.model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    inputs = (("", ""), ids[0].tolist(), answer.tolist())
    assert ours._loglikelihood_tokens([inputs])[0][1] is True
    other = (("", ""), ids[0].tolist(), [*answer.tolist()[:3], (int(answer[3]) + 1) % 500])
    assert ours._loglikelihood_tokens([other])[0][1] is False


def test_log_likelihoods_of_whole_texts_are_those_of_the_hf_backend(ours: Any, expected: Any) -> None:
    asked = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    found = ours.loglikelihood_rolling(asked, disable_tqdm=True)
    wanted = expected.loglikelihood_rolling(asked, disable_tqdm=True)
    assert_close(found, wanted, [len(expected.tok_encode(text)) for text in TEXTS])


def test_answers_are_those_of_the_hf_backend(ours: Any, expected: Any) -> None:
    asked = requests("generate_until", [(prompt, UNTIL) for prompt in PROMPTS])
    assert ours.generate_until(asked, disable_tqdm=True) == expected.generate_until(asked, disable_tqdm=True)


@pytest.mark.parametrize("name", ["f32", "f32-onnx"])
def test_answers_to_chats_are_those_of_the_hf_backend(live: Running, expected: Any, name: str) -> None:
    chat = LocalChatCompletion(base_url=live.v1 + "/chat/completions", model=name, max_retries=1)
    talks = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    until = {"until": ["QQ"], "max_gen_toks": 12, "do_sample": False}
    asked = requests("generate_until", [(chat.apply_chat_template(talk), until) for talk in talks])
    rendered = requests("generate_until", [(expected.apply_chat_template(talk), until) for talk in talks])
    answers = chat.generate_until(asked, disable_tqdm=True)
    assert answers == expected.generate_until(rendered, disable_tqdm=True)
    assert all(answers)


def test_the_tokenizer_can_be_that_of_the_server(base: Path, tmp_path: Path) -> None:
    with running(models.gguf(base, tmp_path / "f32.gguf")) as server:
        remote = LocalCompletionsAPI(base_url=server.v1 + "/completions", model="f32", max_length=CONTEXT + 1)
        assert remote.tokenizer_backend == "remote"
        local = AutoTokenizer.from_pretrained(base)
        for text in ("lamp 7 blue?", "把卧室的灯调暗 👍🏽"):
            assert remote.tok_encode(text) == local(text, add_special_tokens=False).input_ids
            assert remote.decode_batch([remote.tok_encode(text)]) == [text]
