"""The slots of an engine in llama.cpp: caches of earlier requests, adapters, guesses, and exactness."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

import edgetune_native
from edgetune.runtime import Finish, GenerationRequest, RuntimeProblem, Sampling, TokenEvent, load
from edgetune.runtime.engine import Engine
from edgetune.runtime.llama.slots import EngineSlots
from edgetune.runtime.slots import BatchSlots
from tests.converters import family_models, soft_prompts, tiny
from tests.export_requests import export
from tests.runtime import models
from tests.runtime.test_soft_prompts import PROMPTS as SHORT
from tests.runtime.test_soft_prompts import write

LONG = tiny.random_ids(180, seed=3)
OTHER = tiny.random_ids(150, seed=4)


@pytest.fixture
def engine(file: Path) -> Iterator[Engine]:
    with load(file, context=256) as runtime, Engine(runtime, slots=3) as opened:
        assert isinstance(opened._slots, EngineSlots)
        yield opened


def endless(ids: list[int], limit: int, **options: Any) -> GenerationRequest:
    return GenerationRequest(ids, max_tokens=limit, ignore_eos=True, **options)


def answer(engine: Engine, ids: list[int], limit: int = 20, **options: Any) -> list[int]:
    return [event.token for event in engine.submit(endless(ids, limit, **options))]


def alone(engine: Engine, ids: list[int], limit: int = 20) -> list[int]:
    """The answer on a runtime that has no engine and no cache."""
    with load(engine.runtime.path, context=256) as runtime:
        runtime.stop_tokens = frozenset()
        return list(runtime.generate(ids, Sampling(), limit))


def same_tokens(plain: list[TokenEvent], other: list[TokenEvent]) -> int:
    """Return how many tokens were compared: up to a near tie, which another shape of the batch may flip."""
    for place, (expected, found) in enumerate(zip(plain, other, strict=True)):
        if expected.token != found.token:
            assert expected.top[0][1] - expected.top[1][1] < 2e-3
            return place
    return len(plain)


# -- caches of earlier requests ----------------------------------------------------------------------------------------


def test_a_prompt_that_begins_as_an_earlier_one_is_not_evaluated_again(engine: Engine) -> None:
    first = engine.submit(endless(LONG, 10))
    generated = [event.token for event in first]
    assert first.usage.cached_tokens == 0
    turn = [*LONG, *generated, 7, 8, 9]
    second = engine.submit(endless(turn, 10))
    assert [event.token for event in second] == alone(engine, turn, 10)
    assert second.usage.cached_tokens == len(LONG) + len(generated) - 1, "the last token has not been evaluated"
    again = engine.submit(endless(LONG, 10))
    assert [event.token for event in again] == generated
    assert again.usage.cached_tokens == len(LONG) - 1, "the logits of the last token are not kept"
    assert engine.status.cached_tokens == second.usage.cached_tokens + again.usage.cached_tokens


def test_a_request_copies_the_cache_of_one_that_is_running(engine: Engine) -> None:
    running = engine.submit(endless(LONG, 60))
    next(running)
    other = engine.submit(endless([*LONG[:150], 5, 6], 10))
    assert [event.token for event in other] == alone(engine, [*LONG[:150], 5, 6], 10)
    assert other.usage.cached_tokens == 150
    assert len(list(running)) == 59


def test_a_short_common_beginning_does_not_cost_a_long_cache(engine: Engine) -> None:
    answer(engine, LONG, 5)
    for seed in range(2):
        answer(engine, [*LONG[:40], *tiny.random_ids(20, seed=seed)], 5)
    ticket = engine.submit(endless(LONG, 5))
    ticket.wait()
    assert ticket.usage.cached_tokens == len(LONG) - 1


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_caches_with_windows_of_attention_are_continued_too(tmp_path: Path, family: str) -> None:
    """Windows of attention."""
    models.gguf(family_models.base(family, tmp_path / "hf"), tmp_path / "m.gguf")
    with load(tmp_path / "m.gguf", context=256) as runtime:
        size = runtime.vocabulary_size
        prompts = [[id_ % size for id_ in ids] for ids in (LONG, [*LONG[:100], 3, 4], LONG, OTHER)]
        runtime.stop_tokens = frozenset()
        expected = [list(runtime.generate(ids, Sampling(), 12)) for ids in prompts]
        with Engine(runtime, slots=2) as engine:
            assert [answer(engine, ids, 12, lookup=3) for ids in prompts] == expected


@pytest.mark.parametrize("kind", ["prompt-tuning", "prefix-tuning"])
def test_what_stands_before_every_text_stays_in_the_cache(tmp_path: Path, kind: str) -> None:
    base = tiny.base("llama-tied", tmp_path / "base", head_dim=32)
    adapter = soft_prompts.write(kind, base, tmp_path / "adapter", scale=0.3 if kind == "prompt-tuning" else 1.0)
    with load(write(base, adapter, "gguf", tmp_path), threads=1) as runtime:
        runtime.stop_tokens = frozenset()
        prompts = [*SHORT, SHORT[0], [*SHORT[0], 7, 9]]
        expected = [list(runtime.generate(ids, max_tokens=10)) for ids in prompts]
        with Engine(runtime, slots=2) as engine:
            assert [answer(engine, ids, 10) for ids in prompts] == expected
            tickets = [engine.submit(endless(ids, 10, lookup=7)) for ids in prompts]
            assert [[event.token for event in ticket] for ticket in tickets] == expected


# -- exactness ---------------------------------------------------------------------------------------------------------


def test_an_exact_engine_gives_the_same_bits_whatever_else_it_does(file: Path) -> None:
    def logprobs(engine: Engine, others: int) -> list[TokenEvent]:
        tickets = [engine.submit(endless(tiny.random_ids(20 + i, seed=i), 40)) for i in range(others)]
        found = list(engine.submit(endless(LONG, 20, logprobs=2)))
        for ticket in tickets:
            ticket.cancel()
        return found

    with load(file, context=256) as runtime:
        with Engine(runtime, slots=4, is_exact=True) as engine:
            first = logprobs(engine, 0)
            assert logprobs(engine, 3) == first
            assert logprobs(engine, 0) == first
            ticket = engine.submit(endless(LONG, 1))
            ticket.wait()
            assert ticket.usage.cached_tokens == 0
        runtime.stop_tokens = frozenset()
        assert [event.token for event in first] == list(runtime.generate(LONG, Sampling(), 20))


# -- guesses -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def looping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose next token depends mostly on the last one, so that its answers fall into loops."""
    folder = tmp_path_factory.mktemp("looping")
    weights = models.base(folder / "hf") / "model.safetensors"
    tensors = load_file(weights)
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] *= 0.03
    save_file(tensors, weights, {"format": "pt"})
    return models.gguf(folder / "hf", folder / "looping.gguf")


@pytest.mark.parametrize("lookup", [1, 3, 7, 15])
def test_answers_with_guesses_are_those_without(looping: Path, lookup: int) -> None:
    guessed = 0
    with load(looping, context=256) as runtime, Engine(runtime, slots=3) as engine:
        for seed in range(8):
            ids = tiny.random_ids(12, seed=seed)
            plain = answer(engine, ids, 150)
            ticket = engine.submit(endless(ids, 150, lookup=lookup, logprobs=1))
            events = list(ticket)
            assert [event.token for event in events] == plain
            assert [event.top[0][0] for event in events] == plain
            assert (len(events), ticket.usage.generated_tokens) == (150, 150)
            guessed += ticket.usage.guessed_tokens
    assert guessed > 300


def test_guesses_of_several_requests_are_verified_together(looping: Path) -> None:
    with load(looping, context=256) as runtime, Engine(runtime, slots=3) as engine:
        prompts = [tiny.random_ids(10, seed=seed) for seed in range(6)]
        expected = [list(engine.submit(endless(ids, 60, logprobs=2))) for ids in prompts]
        tickets = [engine.submit(endless(ids, 60, lookup=3)) for ids in prompts]
        assert sum(same_tokens(plain, list(ticket)) for plain, ticket in zip(expected, tickets, strict=True)) > 300
        assert sum(ticket.usage.guessed_tokens for ticket in tickets) > 60


def test_the_length_in_the_midst_of_a_guess_ends_the_answer(looping: Path) -> None:
    with load(looping, context=256) as runtime, Engine(runtime, slots=2) as engine:
        for seed in range(6):
            ids = tiny.random_ids(12, seed=seed)
            plain = answer(engine, ids, 100)
            for limit in (57, 60, 61):
                assert answer(engine, ids, limit, lookup=7) == plain[:limit]
            assert answer(engine, ids, 100) == plain, "the cache has nothing of the rejected guesses"


def test_guesses_end_with_the_context(looping: Path) -> None:
    with load(looping, context=64) as runtime, Engine(runtime, slots=1) as engine:
        ids = tiny.random_ids(8, seed=1) * 6
        plain = engine.submit(endless(ids, 100))
        ticket = engine.submit(endless(ids, 100, lookup=15))
        assert list(ticket) == list(plain)
        assert ticket.finish is plain.finish is Finish.CONTEXT


def test_more_guesses_than_there_is_room_for_are_refused(engine: Engine) -> None:
    with pytest.raises(RuntimeProblem, match="lookup is 16"):
        engine.submit(endless(LONG, 5, lookup=16))


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> GGUF adapter, and merged: the model with the first one."""
    folder = tmp_path_factory.mktemp("adapters")
    found = {}
    for seed, name in enumerate(("first", "second")):
        adapter = tiny.adapter(base, folder / name, seed=seed)
        export(base, {}, lora={"f32": folder / f"{name}.gguf"}, adapter=adapter)
        found[name] = folder / f"{name}.gguf"
    export(base, {"f32": folder / "merged.gguf"}, adapter=folder / "first")
    return {**found, "merged": folder / "merged.gguf"}


def test_requests_have_the_adapters_that_they_name(engine: Engine, adapters: dict[str, Path]) -> None:
    assert [engine.load_adapter(adapters[name]) for name in ("first", "second")] == ["first", "second"]
    assert set(engine.runtime.adapters) == {"first", "second"}
    ids = LONG[:30]
    sets: list[Any] = [(), (("first", 1.0),), (("second", 1.0),), (("first", 0.5), ("second", -0.25))]
    one_by_one = [answer(engine, ids, adapters=each) for each in sets]
    assert len({tuple(tokens) for tokens in one_by_one}) == len(sets)
    tickets = [engine.submit(endless(ids, 20, adapters=each)) for _ in range(3) for each in sets]
    assert [[event.token for event in ticket] for ticket in tickets] == one_by_one * 3
    assert answer(engine, ids, adapters=(("first", 0.0),)) == one_by_one[0]
    with load(adapters["merged"], context=256) as merged:
        merged.stop_tokens = frozenset()
        assert list(merged.generate(ids, Sampling(), 20)) == one_by_one[1]
    with load(engine.runtime.path, context=256) as runtime:
        runtime.stop_tokens = frozenset()
        for path in ("first", "second"):
            runtime.load_adapter(adapters[path], path)
        for each, tokens in zip(sets, one_by_one, strict=True):
            runtime.use_adapters(each)
            assert list(runtime.generate(ids, Sampling(), 20)) == tokens


def test_a_cache_is_not_continued_with_another_adapter(engine: Engine, adapters: dict[str, Path]) -> None:
    engine.load_adapter(adapters["first"])
    with_it = (("first", 1.0),)
    expected = answer(engine, LONG, adapters=with_it)
    answer(engine, LONG)
    for chosen, cached in ((with_it, len(LONG) - 1), ((("first", 0.5),), 0), ((), len(LONG) - 1)):
        ticket = engine.submit(endless(LONG, 5, adapters=chosen))
        ticket.wait()
        assert ticket.usage.cached_tokens == cached
    engine.unload_adapter("first")
    assert engine.load_adapter(adapters["second"], "first") == "first"
    ticket = engine.submit(endless(LONG, 20, adapters=with_it))
    assert [event.token for event in ticket] != expected
    assert ticket.usage.cached_tokens == 0


def test_scores_have_the_adapters_that_are_named(engine: Engine, adapters: dict[str, Path]) -> None:
    engine.load_adapter(adapters["first"])
    plain = engine.score(OTHER).logprobs
    changed = engine.score(OTHER, adapters=(("first", 1.0),)).logprobs
    with load(adapters["merged"], context=256) as merged, Engine(merged, slots=1) as other:
        assert other.score(OTHER).logprobs == pytest.approx(changed, abs=2e-2)
    assert abs(plain - changed).max() > 0.5
    assert engine.score(OTHER).logprobs.tolist() == plain.tolist()


def test_adapters_that_cannot_be_used_are_refused(
    engine: Engine, adapters: dict[str, Path], tmp_path: Path, file: Path
) -> None:
    other = tiny.base("llama", tmp_path / "base")
    export(other, {}, lora={"f32": tmp_path / "l.gguf"}, adapter=tiny.adapter(other, tmp_path / "adapter"))
    (tmp_path / "text.gguf").write_text("no", encoding="utf-8")
    for path in (tmp_path / "l.gguf", file, tmp_path / "none.gguf", tmp_path / "text.gguf"):
        with pytest.raises(RuntimeProblem, match=path.name):
            engine.load_adapter(path)
    engine.load_adapter(adapters["first"])
    with pytest.raises(RuntimeProblem, match="'first' is loaded already"):
        engine.load_adapter(adapters["first"])
    for wrong, said in (
        ((("none", 1.0),), "no adapter 'none'; loaded are first"), ((("first", float("nan")),), "weight"),
        ((("first", 1.0), ("first", 1.0)), "twice"),
    ):  # fmt: skip
        with pytest.raises(RuntimeProblem, match=said):
            engine.submit(endless(LONG, 5, adapters=wrong))
    running = engine.submit(endless(OTHER, 90, adapters=(("first", 1.0),)))
    next(running)
    with pytest.raises(RuntimeProblem, match="requests use adapter 'first'"):
        engine.unload_adapter("first")
    running.cancel()
    list(running)
    engine.unload_adapter("first")
    with pytest.raises(RuntimeProblem, match="none is loaded"):
        engine.unload_adapter("first")
    assert answer(engine, LONG) == alone(engine, LONG)


def test_onnx_takes_no_adapters(folder: Path, adapters: dict[str, Path]) -> None:
    with load(folder) as runtime, Engine(runtime) as engine:
        with pytest.raises(RuntimeProblem, match="takes no adapters"):
            engine.load_adapter(adapters["first"])
        with pytest.raises(RuntimeProblem, match="no adapter"):
            engine.submit(endless(LONG, 5, adapters=(("first", 1.0),)))


# -- the loop ----------------------------------------------------------------------------------------------------------


def test_cancelling_ends_the_evaluation_of_a_long_prompt(base: Path, tmp_path: Path) -> None:
    models.gguf(base, tmp_path / "m.gguf")
    with load(tmp_path / "m.gguf", context=256) as runtime, Engine(runtime, slots=2) as engine:
        slots = engine._slots
        assert isinstance(slots, EngineSlots)
        begun, go_on = threading.Event(), threading.Event()
        turn = slots.turn
        interrupted: list[bool] = []

        def turn_that_waits() -> Any:
            begun.set()
            go_on.wait(10)
            slots._context._interrupts._memory[0] = 1 if engine._has_cancelled else 0  # as during the batch
            interrupted.append(engine._has_cancelled)
            return turn()

        slots.turn = turn_that_waits  # type: ignore[method-assign]
        ticket = engine.submit(endless(LONG, 5))
        begun.wait(10)
        ticket.cancel()
        go_on.set()
        assert list(ticket) == []
        assert ticket.finish is Finish.CANCEL
        assert interrupted == [True]
        assert len(answer(engine, LONG, 5)) == 5


def test_without_the_c_extension_the_engine_decodes_in_python(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edgetune_native, "has_llama_slots", lambda: False)
    with load(file, context=256) as runtime, Engine(runtime, slots=3) as engine:
        assert isinstance(engine._slots, BatchSlots)
        assert answer(engine, LONG) == alone(engine, LONG)


def test_memory_of_an_engine_is_freed(file: Path) -> None:
    with load(file, context=256) as runtime:
        for _ in range(3):
            with Engine(runtime, slots=2) as engine:
                ticket = engine.submit(endless(LONG, 50, sampling=Sampling(1.0, seed=1)))
                next(ticket)
            slots = engine._slots
            assert isinstance(slots, EngineSlots)
            assert slots._loop is None
            assert all(state.chain is None for state in slots._states)
