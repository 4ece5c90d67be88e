"""Every model of edgetune in the harness gives what the harness's own class for transformers models gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgetune.errors import ConfigError, DataError
from edgetune.evaluation.evaluate import file_opener
from edgetune.evaluation.harness_model import HarnessModel, PromptSettings
from edgetune.runs.directory import RunDirectory
from edgetune.training.evaluated_model import open_trained

CONTEXT = 96
PAIRS = [
    ("lamp 7 blue?", " blue"),
    ("lamp 7 blue?", " green"),
    ("lamp 7 blue? ", "white and more words"),  # the space at the end moves to the continuation
    ("", "a text without context"),
    ("<|im_start|>user\nlamp<|im_end|>\n", "red<|im_end|>"),
    ("把卧室的灯调暗", "好的"),
    ("word " * 90, "the context is cut on the left"),
]
TEXTS = ["one short text", " ".join(f"lamp {number}" for number in range(90)), "x"]  # HFLM confuses equal windows
PROMPTS = ["lamp 3 white?", "lamp 4 red?\nwhite\n", "a b c d e f g h", "word " * 90]
UNTIL = {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False}


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=0, metadata=("a task", number, 1))
        for number, each in enumerate(arguments)
    ]


def tokens(model: Any) -> list[Any]:
    return [
        ("", "", model.tok_encode(text)) if not context else model._encode_pair(context, text)
        for context, text in PAIRS
    ]


def assert_close(found: list[float], wanted: list[float], counts: list[int]) -> None:
    """Compare by token: llama.cpp's cache holds keys and values in f16, which moves a log-probability by up to 1e-4."""
    changes = np.abs(np.subtract(found, wanted)) / counts
    assert changes.max() < 1e-4, changes


@pytest.fixture(scope="module")
def expected(run: RunDirectory, base: Path) -> Any:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), run.adapter)
    tokenizer = AutoTokenizer.from_pretrained(run.tokenizer)
    return HFLM(pretrained=model, tokenizer=tokenizer, max_length=CONTEXT, batch_size=4)


@pytest.fixture(scope="module", params=["trained", "trained, one at a time", "gguf", "onnx"])
def ours(request: pytest.FixtureRequest, run: RunDirectory) -> Iterator[HarnessModel]:
    files = {"gguf": "lamp-f32.gguf", "onnx": "lamp-f32-onnx"}
    with ExitStack() as stack:
        if request.param in files:
            model = stack.enter_context(file_opener(run.artifacts / files[request.param], 1)(CONTEXT))
        else:
            size = 1 if "one" in request.param else None
            model = stack.enter_context(open_trained(run, CONTEXT, size))
        yield HarnessModel(model, PromptSettings(CONTEXT, model.prefix_token, None), lambda done, total: None)


def test_token_ids_are_those_of_transformers(ours: HarnessModel, expected: Any) -> None:
    assert ours.prefix_token_id == expected.prefix_token_id
    for text in [*TEXTS, *(part for pair in PAIRS for part in pair)]:
        assert ours.tok_encode(text) == expected.tok_encode(text)
        assert ours.tok_encode(text, add_special_tokens=False) == expected.tok_encode(text, add_special_tokens=False)
    for context, continuation in PAIRS:
        if context:
            assert ours._encode_pair(context, continuation) == expected._encode_pair(context, continuation)


def test_log_likelihoods_are_those_of_transformers(ours: HarnessModel, expected: Any) -> None:
    found = ours.loglikelihood(requests("loglikelihood", PAIRS))
    wanted = expected.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert_close(
        [score for score, _ in found], [score for score, _ in wanted], [len(ids) for *_, ids in tokens(expected)]
    )
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_a_greedy_continuation_is_recognized(ours: HarnessModel, expected: Any) -> None:
    prompt = "lamp 3 white?"
    ids = ours.tok_encode(prompt)
    logits = expected._model_call(torch.tensor([ids]))[0, -1]
    texts = [
        expected.tok_decode([int(token)], skip_special_tokens=False) for token in (logits.argmax(), logits.argmin())
    ]
    pairs = [(prompt, text) for text in texts if ours.tok_encode(prompt + text)[: len(ids)] == ids]
    assert len(pairs) == 2
    found = ours.loglikelihood(requests("loglikelihood", pairs))
    assert [greedy for _, greedy in found] == [True, False]


def test_log_likelihoods_of_whole_texts_are_those_of_transformers(ours: HarnessModel, expected: Any) -> None:
    arguments = [(text,) for text in TEXTS]
    assert len(ours.tok_encode(TEXTS[1])) > 2 * CONTEXT
    found = ours.loglikelihood_rolling(requests("loglikelihood_rolling", arguments))
    wanted = expected.loglikelihood_rolling(requests("loglikelihood_rolling", arguments), disable_tqdm=True)
    assert_close(found, wanted, [len(expected.tok_encode(text)) for text in TEXTS])


def test_answers_are_those_of_transformers(ours: HarnessModel, expected: Any) -> None:
    arguments = [(prompt, UNTIL) for prompt in PROMPTS] + [(PROMPTS[0], {"until": [], "max_gen_toks": 20})]
    found = ours.generate_until(requests("generate_until", arguments))
    wanted = expected.generate_until(requests("generate_until", arguments), disable_tqdm=True)
    assert [text.lstrip() for text in found] == [text.lstrip() for text in wanted]
    assert len(set(found)) > 1


def test_truncated_prompts_are_counted(ours: HarnessModel) -> None:
    before = ours.truncated
    ours.loglikelihood(requests("loglikelihood", PAIRS[-2:]))
    ours.generate_until(requests("generate_until", [(PROMPTS[-1], UNTIL), (PROMPTS[0], UNTIL)]))
    assert ours.truncated == before + 2


def test_sampling_tasks_are_refused(ours: HarnessModel) -> None:
    sampled = requests("generate_until", [("lamp", {"until": [], "do_sample": True, "temperature": 0.7})])
    with pytest.raises(ConfigError, match="samples its answers"):
        ours.generate_until(sampled)


def test_answers_and_continuations_longer_than_the_context_are_refused(ours: HarnessModel) -> None:
    with pytest.raises(ConfigError, match=f"up to {CONTEXT} tokens, but the context is {CONTEXT}"):
        ours.generate_until(requests("generate_until", [("lamp", {"until": [], "max_gen_toks": CONTEXT})]))
    with pytest.raises(DataError, match="has a continuation of"):
        ours.loglikelihood(requests("loglikelihood", [("a", "lamp " * 200)]))
