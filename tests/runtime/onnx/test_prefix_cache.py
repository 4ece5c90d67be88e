"""Prompts that begin as an earlier sequence continue its keys and values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgetune.runtime import GenerationRequest, load
from edgetune.runtime.engine import Engine
from edgetune.runtime.onnx.prefix_cache import PrefixCache
from tests.converters import tiny

LONG = tiny.random_ids(120, seed=1)


@pytest.fixture(params=["onnx", "portable"])
def graph(request: pytest.FixtureRequest, artifacts: dict[str, Path]) -> Path:
    return artifacts[request.param]


def answer(engine: Engine, ids: list[int], limit: int = 12) -> tuple[list[int], int]:
    ticket = engine.submit(GenerationRequest(ids, max_tokens=limit, ignore_eos=True))
    return [event.token for event in ticket], ticket.usage.cached_tokens


@pytest.mark.parametrize("slots", [1, 3])
def test_a_prompt_continues_the_sequence_that_it_begins_as(graph: Path, slots: int) -> None:
    with load(graph, context=256) as runtime:
        follow = tiny.random_ids(9, seed=2)
        with Engine(runtime, slots=slots, is_exact=True) as exact:
            first = answer(exact, LONG)[0]
            prompts = [LONG + first + follow, LONG[:70] + follow, LONG, LONG[:10] + follow]
            expected = [answer(exact, ids)[0] for ids in prompts]
        with Engine(runtime, slots=slots) as engine:
            assert answer(engine, LONG) == (first, 0)
            found = [answer(engine, ids) for ids in prompts]
            assert engine.status.cached_tokens == sum(cached for _, cached in found)
    assert [tokens for tokens, _ in found] == expected
    assert [cached for _, cached in found] == [len(LONG) + 11, 70, len(LONG) - 1, 0]


def test_a_prompt_continues_a_sequence_that_is_running(graph: Path) -> None:
    with load(graph, context=256) as runtime:
        prompts = [LONG + tiny.random_ids(5, seed=seed) for seed in range(4)]
        with Engine(runtime, slots=1, is_exact=True) as exact:
            expected = [answer(exact, ids, 40)[0] for ids in prompts]
        with Engine(runtime, slots=4) as engine:
            first = engine.submit(GenerationRequest(prompts[0], max_tokens=40, ignore_eos=True))
            head = next(first)
            tickets = [engine.submit(GenerationRequest(ids, max_tokens=40, ignore_eos=True)) for ids in prompts[1:]]
            found = [[event.token for event in ticket] for ticket in tickets]
            assert [head.token, *(event.token for event in first)] == expected[0]
    assert found == expected[1:]
    assert [ticket.usage.cached_tokens for ticket in tickets] == [len(LONG)] * 3


def test_the_sequence_that_was_not_used_for_longest_is_dropped() -> None:
    cache = PrefixCache(3 * 4 * 20)
    texts = [np.arange(start, start + 20, dtype=np.int32) for start in (0, 100, 200)]
    for text in texts:
        cache.keep(text, [np.zeros((1, 20, 1), np.float32)])
    cache.find(texts[0])
    cache.keep(np.arange(300, 320, dtype=np.int32), [np.zeros((1, 20, 1), np.float32)])
    assert [cache.match(text) for text in texts] == [20, 0, 20]
    longer = np.arange(40, dtype=np.int32)
    cache.keep(longer, [np.zeros((1, 40, 1), np.float32)])
    assert cache.match(longer) == 40, "the sequence that it continues has made room for it"
    cache.keep(np.arange(500, 600, dtype=np.int32), [np.zeros((1, 100, 1), np.float32)])
    assert cache.match(np.arange(500, 600, dtype=np.int32)) == 0, "one that is too large is not kept"
