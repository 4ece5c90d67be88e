"""Multiple choice: the likeliest continuation wins, as transformers would have it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edgetune.config import parse_config
from edgetune.errors import ConfigError
from edgetune.runtime import load
from edgetune.validation.choices import best, continuations, log_likelihoods
from edgetune.validation.task import choose, run_task
from tests.converters import tiny

CHOICES = ["red", "a long answer of several tokens", "把卧室的灯", "A"]


def test_the_likeliest_is_that_of_transformers(base: Path, whole: Path) -> None:
    messages = [{"role": "user", "content": "which colour?"}]
    with load(whole) as runtime:
        assert runtime.chat_template is not None
        prompt = runtime.chat_template.render(messages, add_generation_prompt=True)
        wanted = []
        for choice in CHOICES:
            ids, start = runtime.tokenize(prompt + choice), len(runtime.tokenize(prompt))
            logits = tiny.torch_logits(base, None, ids)[start - 1 : -1].astype(np.float64)
            log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            wanted.append(sum(row[token] for row, token in zip(log_probs, ids[start:], strict=True)))
        assert choose(runtime, {"messages": messages, "choices": CHOICES}) == CHOICES[int(np.argmax(wanted))]


def test_the_task_counts_choices(whole: Path) -> None:
    messages = [{"role": "user", "content": "which colour?"}]
    row = {"messages": messages, "choices": CHOICES, "base": "A"}
    with load(whole) as runtime:
        chosen = choose(runtime, row)
        other = next(choice for choice in CHOICES if choice != chosen)
        rows = [row | {"expected": chosen, "trained": chosen}, row | {"expected": other, "trained": other}]
        score = run_task(runtime, {"kind": "choice", "rows": rows}, 5, lambda *_: None)
    assert score is not None
    assert (score.rows, score.right, score.same_as_trained) == (2, 1, 1)
    assert score.first_miss == {"prompt": "which colour?", "expected": other, "got": chosen}


def test_a_choice_that_would_merge_with_the_prompt_is_tokenized_apart() -> None:
    """Characters as tokens, but `ab` is one: the model that is given `xa` cannot generate it."""
    tokens = {"ab": 9}

    def encode(text: str) -> list[int]:
        found, place = [], 0
        while place < len(text):
            pair = text[place : place + 2]
            found.append(tokens.get(pair, ord(text[place])))
            place += 2 if pair in tokens else 1
        return found

    def decode(ids: Sequence[int]) -> str:
        return "".join("ab" if id_ == 9 else chr(id_) for id_ in ids)

    (apart, plain) = continuations(encode, decode, "xa", ["b", "c"])
    assert (apart[0].tolist(), apart[1].tolist()) == ([ord("x"), ord("a"), ord("b")], [2])
    assert (plain[0].tolist(), plain[1].tolist()) == ([ord("x"), ord("a"), ord("c")], [2])


def test_log_likelihoods_of_extreme_logits() -> None:
    found = log_likelihoods(np.array([[1e4, 0.0], [0.0, 0.0]], np.float32), np.array([0, 1]))
    assert found.tolist() == pytest.approx([0.0, -math.log(2)])
    assert best(["a", "b", "c"], [1.0, 2.0, 2.0]) == "b"


@pytest.mark.parametrize("choices", [[], ["A"], ["A", "A"]])
def test_a_choice_wants_choices(choices: list[str]) -> None:
    with pytest.raises(ConfigError, match="fewer than two"):
        parse_config({"base": "b", "data": {"train": "t", "answer": "choice", "choices": choices}})
