"""Many requests on one model: each has the answer that it has alone."""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.runtime import Finish, GenerationRequest, Grammar, Runtime, RuntimeProblem, Sampling, TokenEvent, load
from edgetune.runtime.engine import Engine, EngineClosed, QueueFull
from edgetune.runtime.grammar import GrammarProblem
from tests.converters import tiny

PROMPTS = [tiny.random_ids(length, seed=length) for length in (1, 3, 60, 17, 40, 2, 140, 33)]
LIMITS = [9, 1, 30, 12, 20, 40, 5, 25]


@pytest.fixture
def engine(artifact: Path) -> Iterator[Engine]:
    with load(artifact, context=256) as runtime, Engine(runtime, slots=3) as opened:
        yield opened


def tokens(events: list[TokenEvent]) -> list[int]:
    return [event.token for event in events]


def endless(ids: list[int], limit: int = 200, **options: Any) -> GenerationRequest:
    return GenerationRequest(ids, max_tokens=limit, ignore_eos=True, **options)


@pytest.mark.parametrize(
    ("sampling", "slots", "most"),
    # what is drawn can turn on the last bits of f16 keys and values, so that the batch must have the same shape
    [(Sampling(), 3, 40), (Sampling(1.2, top_k=20, top_p=0.95, seed=5), 1, 10)],
    ids=["greedy", "seed"],
)
def test_requests_have_the_answers_that_generate_gives(
    artifact: Path, sampling: Sampling, slots: int, most: int
) -> None:
    limits = [min(limit, most) for limit in LIMITS]
    with load(artifact, context=256) as runtime:
        expected = []
        for ids, limit in zip(PROMPTS, limits, strict=True):
            generation = runtime.generate(ids, sampling, limit)
            expected.append((list(generation), generation.finish))
        with Engine(runtime, slots=slots) as engine:
            requests = [GenerationRequest(ids, sampling, limit) for ids, limit in zip(PROMPTS, limits, strict=True)]
            tickets = [engine.submit(request) for request in requests]
            assert [(tokens(list(ticket)), ticket.finish) for ticket in tickets] == expected
            assert engine.status.active == engine.status.waiting == 0
            assert engine.status.requests == len(PROMPTS)
            assert engine.status.generated_tokens == sum(ticket.usage.generated_tokens for ticket in tickets)


def test_log_probabilities_are_the_log_softmax_of_the_logits(engine: Engine) -> None:
    ticket = engine.submit(endless(PROMPTS[3], 6, logprobs=3, sampling=Sampling(1.0, seed=1)))
    events = list(ticket)
    engine.close()
    logits = engine.runtime._prefill(np.array(PROMPTS[3], np.int32)).copy()
    for number, event in enumerate(events):
        values = logits.astype(np.float64)
        logprobs = values - values.max() - math.log(np.exp(values - values.max()).sum())
        assert event.logprob == pytest.approx(logprobs[event.token], abs=2e-3)
        assert [id_ for id_, _ in event.top] == np.argsort(-logits)[:3].tolist()
        assert [value for _, value in event.top] == pytest.approx(logprobs[[id_ for id_, _ in event.top]], abs=2e-3)
        logits = engine.runtime._step(event.token, len(PROMPTS[3]) + number).copy()


def test_tokens_have_their_bytes_and_no_log_probability_unless_asked(engine: Engine) -> None:
    for event in engine.submit(endless(PROMPTS[0], 5)):
        assert event.bytes_ == engine.runtime.token_bytes(event.token)
        assert event.logprob is None
        assert event.top == ()
    (event,) = engine.submit(endless(PROMPTS[0], 1, logprobs=0))
    assert event.logprob is not None
    assert event.top == ()


def test_a_stop_string_ends_the_answer_and_is_not_shown(engine: Engine) -> None:
    whole = list(engine.submit(endless(PROMPTS[2], 20)))
    text = b"".join(event.bytes_ for event in whole)
    stop = text[8:12].decode("latin-1") if text.isascii() else text.decode("utf-8", "replace")[4:7]
    raw = stop.encode()
    if raw not in text:
        pytest.skip("the answer has no text of three characters")
    ticket = engine.submit(endless(PROMPTS[2], 20, stop=(stop, "never")))
    assert b"".join(event.bytes_ for event in ticket) == text[: text.find(raw)]
    assert (ticket.finish, ticket.stop) == (Finish.STOP, stop)


def test_a_stop_token_ends_the_answer_and_is_told(engine: Engine) -> None:
    whole = tokens(list(engine.submit(endless(PROMPTS[2], 20))))
    ticket = engine.submit(endless(PROMPTS[2], 20, stop_tokens=frozenset({whole[7]})))
    assert tokens(list(ticket)) == whole[: whole.index(whole[7])]
    assert (ticket.finish, ticket.stop) == (Finish.STOP, whole[7])
    assert ticket.usage.generated_tokens == whole.index(whole[7]) + 1


def test_the_context_ends_an_answer(engine: Engine) -> None:
    ticket = engine.submit(endless(tiny.random_ids(250), 100))
    assert len(list(ticket)) == 7  # the last token has no place in the context, and is chosen all the same
    assert ticket.finish is Finish.CONTEXT


def test_no_tokens_are_generated_where_none_are_wanted(engine: Engine) -> None:
    ticket = engine.submit(GenerationRequest(PROMPTS[0], max_tokens=0))
    assert list(ticket) == []
    assert ticket.finish is Finish.LENGTH


def test_a_cancelled_answer_ends_and_frees_its_slot(engine: Engine) -> None:
    tickets = [engine.submit(endless(PROMPTS[0])) for _ in range(5)]  # two of them wait
    for ticket in tickets[:3]:
        next(ticket)
    for ticket in tickets[:3]:
        ticket.cancel()
    for ticket in tickets[:3]:
        assert len(list(ticket)) < 199
        assert ticket.finish is Finish.CANCEL
    tickets[4].cancel()
    assert len(list(tickets[3])) == 200
    tickets[4].wait(10)
    assert tickets[4].finish is Finish.CANCEL
    assert engine.status.active == engine.status.waiting == 0


def test_an_event_loop_reads_several_answers_at_once(engine: Engine) -> None:
    async def read(ids: list[int]) -> list[int]:
        return [event.token async for event in engine.submit(endless(ids, 15))]

    async def read_all() -> list[list[int]]:
        return list(await asyncio.gather(*(read(ids) for ids in PROMPTS)))

    found = asyncio.run(read_all())
    assert found == [tokens(list(engine.submit(endless(ids, 15)))) for ids in PROMPTS]


def test_a_reader_that_goes_away_in_an_event_loop_does_not_stop_the_others(engine: Engine) -> None:
    async def leave() -> None:
        ticket = engine.submit(endless(PROMPTS[0]))
        await ticket.read_async()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.submit(endless(tiny.random_ids(200))).read_async(), 1e-6)
        ticket.cancel()

    asyncio.run(leave())
    assert len(list(engine.submit(endless(PROMPTS[1], 4)))) == 4


def test_a_full_queue_refuses(artifact: Path) -> None:
    with load(artifact) as runtime, Engine(runtime, slots=1, queue=2) as engine:
        running = engine.submit(endless(PROMPTS[0], 500))
        next(running)
        waiting = [engine.submit(endless(PROMPTS[0], 1)) for _ in range(2)]
        with pytest.raises(QueueFull, match="2 requests"):
            engine.submit(endless(PROMPTS[0], 1))
        with pytest.raises(QueueFull):
            engine.score(PROMPTS[2])
        running.cancel()
        assert [len(list(ticket)) for ticket in waiting] == [1, 1]


def test_closing_finishes_what_it_can_by_the_deadline_and_cancels_the_rest(artifact: Path) -> None:
    with load(artifact) as runtime:
        engine = Engine(runtime, slots=2)
        short = engine.submit(endless(PROMPTS[0], 5))
        engine.close(30)
        assert (len(list(short)), short.finish) == (5, Finish.LENGTH)
        with pytest.raises(EngineClosed):
            engine.submit(endless(PROMPTS[0], 5))
        engine = Engine(runtime, slots=1)
        long, waiting = (engine.submit(endless(PROMPTS[0], 500)) for _ in range(2))
        next(long)
        engine.close()
        assert [ticket.finish for ticket in (long, waiting)] == [Finish.CANCEL] * 2
        engine.close()


def test_an_error_of_the_model_is_raised_where_tokens_are_awaited(engine: Engine, monkeypatch: Any) -> None:
    def fail() -> None:
        raise RuntimeProblem("the model fell over")

    ticket = engine.submit(endless(PROMPTS[0]))
    next(ticket)
    monkeypatch.setattr(engine._slots, "turn", fail)
    with pytest.raises(RuntimeProblem, match="fell over"):
        list(ticket)
    with pytest.raises(EngineClosed, match="fell over"):
        engine.submit(endless(PROMPTS[0]))
    assert ticket.finish is None


BAD: list[tuple[GenerationRequest, str]] = [
    (GenerationRequest([]), "empty"), (GenerationRequest([523]), "outside"), (GenerationRequest([1] * 300), "context"),
    (GenerationRequest([1], max_tokens=-1), "max_tokens"), (GenerationRequest([1], logprobs=1000), "logprobs"),
    (GenerationRequest([1], stop=("",)), "empty"), (GenerationRequest([1], stop_tokens=frozenset({523})), "stop token"),
    (GenerationRequest([1], Sampling(-1.0)), "temperature"),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "said"), BAD, ids=[said for _, said in BAD])
def test_a_request_that_cannot_be_done_is_refused_when_it_is_submitted(
    engine: Engine, request_: GenerationRequest, said: str
) -> None:
    with pytest.raises(RuntimeProblem, match=said):
        engine.submit(request_)
    assert engine.status.waiting == 0


# -- scores ------------------------------------------------------------------------------------------------------------


def test_scores_are_the_log_softmax_of_the_texts_logits_while_answers_go_on(engine: Engine) -> None:
    tickets = [engine.submit(endless(ids, 40)) for ids in PROMPTS[:4]]
    found = engine.score(PROMPTS[6], top=4)
    some = engine.score(PROMPTS[6], [5, 100, 101])
    answers = [tokens(list(ticket)) for ticket in tickets]
    assert answers == [tokens(list(engine.submit(endless(ids, 40)))) for ids in PROMPTS[:4]]
    engine.close()
    ids = np.array(PROMPTS[6], np.int32)
    logits = np.concatenate([block.copy() for block in engine.runtime.score(ids, np.arange(1, len(ids)))])
    values = logits.astype(np.float64)
    expected = values - np.log(np.exp(values).sum(axis=1))[:, None]
    np.testing.assert_allclose(found.logprobs, expected[np.arange(len(ids) - 1), ids[1:]], atol=1e-6)
    np.testing.assert_array_equal(found.top_ids, np.argsort(-logits, axis=1, kind="stable")[:, :4])
    np.testing.assert_allclose(found.top_logprobs, np.take_along_axis(expected, found.top_ids, axis=1), atol=1e-6)
    np.testing.assert_array_equal(found.is_top, found.top_ids[:, 0] == ids[1:])
    np.testing.assert_allclose(some.logprobs, found.logprobs[[4, 99, 100]], atol=2e-3)


def test_bad_texts_are_refused_when_they_are_submitted(engine: Engine) -> None:
    for ids, positions in (([1, 523], None), ([1, 2], [2]), ([1, 2, 3], [2, 1]), ([1, 2], [0]), ([1] * 300, None)):
        with pytest.raises(RuntimeProblem):
            engine.submit_score(ids, positions)
    assert len(engine.score([1]).logprobs) == 0


# -- grammars ----------------------------------------------------------------------------------------------------------

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}, "room": {"enum": ["bath", "hall"]}},
    "required": ["on", "room"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.5, seed=2)], ids=["greedy", "seed"])
def test_an_answer_to_a_schema_is_json_of_the_schema(engine: Engine, sampling: Sampling) -> None:
    """A random model writes whitespace for ever, so the schema excludes it."""
    grammar = Grammar.json_schema(json.dumps({**SCHEMA, "x-guidance": {"whitespace_flexible": False}}))
    tickets = [engine.submit(GenerationRequest(ids, sampling, 100, grammar=grammar)) for ids in PROMPTS[:4]]
    for ticket in tickets:
        answer = json.loads(b"".join(event.bytes_ for event in ticket))
        assert set(answer) == {"on", "room"}
        assert ticket.finish is Finish.STOP


def test_whitespace_in_an_answer_to_a_schema_is_bounded(engine: Engine) -> None:
    """A random model would fill its context with it."""
    grammar = Grammar.json_schema(json.dumps(SCHEMA))
    for seed in range(4):
        ticket = engine.submit(GenerationRequest(PROMPTS[0], Sampling(1.5, seed=seed), 120, grammar=grammar))
        text = b"".join(event.bytes_ for event in ticket).decode()
        assert all(re.fullmatch(r" ?|\n{1,2}[ \t]{0,20}", space) for space in re.findall(r"[ \t\r\n]+", text)), repr(
            text
        )


GRAMMARS = [
    Grammar("gbnf", 'root ::= "yes" | "no"'), Grammar("lark", 'start: "yes" | "no"'), Grammar("regex", "yes|no"),
]  # fmt: skip


@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda grammar: grammar.kind)
def test_an_answer_matches_its_grammar(engine: Engine, grammar: Grammar) -> None:
    answers = {
        b"".join(event.bytes_ for event in engine.submit(GenerationRequest(ids, max_tokens=20, grammar=grammar)))
        for ids in PROMPTS
    }
    assert answers <= {b"yes", b"no"}


BAD_GRAMMARS = [
    Grammar("gbnf", "root ::= undefined"), Grammar("gbnf", "root = ("), Grammar("lark", "start: [[["),
    Grammar("regex", "(["), Grammar.json_schema("{"), Grammar.json_schema('{"type": "colour"}'),
    Grammar.json_schema('{"$ref": "#/nowhere"}'), Grammar.json_schema('{"minimum": "x"}'), Grammar.json_schema("3"),
    Grammar.json_schema('{"not": {"type": "object"}, "unevaluatedProperties": false}'), Grammar.json_schema("false"),
]  # fmt: skip


@pytest.mark.parametrize("grammar", BAD_GRAMMARS, ids=lambda grammar: grammar.text)
def test_a_grammar_that_cannot_be_compiled_is_refused(engine: Engine, grammar: Grammar) -> None:
    with pytest.raises(GrammarProblem, match="cannot be compiled"):
        engine.submit(GenerationRequest(PROMPTS[0], grammar=grammar))
    assert len(list(engine.submit(endless(PROMPTS[0], 3)))) == 3


# -- threads -----------------------------------------------------------------------------------------------------------


def test_many_threads_submit_cancel_and_score_at_once(artifact: Path) -> None:
    with load(artifact, context=256) as runtime, Engine(runtime, slots=3, queue=100) as engine:
        expected = {i: tokens(list(engine.submit(endless(PROMPTS[i], 12)))) for i in range(len(PROMPTS))}
        wrong: list[Any] = []

        def work(seed: int) -> None:
            random = np.random.default_rng(seed)
            for _ in range(8):
                which = int(random.integers(len(PROMPTS)))
                ticket = engine.submit(endless(PROMPTS[which], 12))
                if random.random() < 0.4:
                    time.sleep(random.random() * 0.01)
                    ticket.cancel()
                found = tokens(list(ticket))
                if found != expected[which][: len(found)] or ticket.finish not in (Finish.LENGTH, Finish.CANCEL):
                    wrong.append((which, found, ticket.finish))
                if random.random() < 0.2:
                    engine.score(PROMPTS[2])

        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert wrong == []
        assert engine.status.active == engine.status.waiting == 0


def test_the_runtime_can_be_used_again_after_the_engine(artifact: Path) -> None:
    with load(artifact) as runtime:
        expected = list(runtime.generate(PROMPTS[2], Sampling(), 5))
        with Engine(runtime) as engine:
            list(engine.submit(endless(PROMPTS[0], 5)))
        assert list(runtime.generate(PROMPTS[2], Sampling(), 5)) == expected
        assert isinstance(runtime, Runtime)
