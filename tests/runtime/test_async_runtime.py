"""Answers, scores and embeddings for the tasks of an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgetune
from edgetune.runtime import Finish, RuntimeProblem, load
from edgetune.runtime.async_runtime import AsyncRuntime, load_async
from edgetune.runtime.engine import EngineClosed
from tests.runtime import models

QUESTIONS = ["dim the lights", "dim the bedroom lights to 30%", "good night"]
HOT = edgetune.Sampling(temperature=1.0, seed=3)


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def in_loop(path: Path, work: Callable[[AsyncRuntime], Awaitable[Any]], **options: Any) -> Any:
    async def main() -> Any:
        async with load_async(path, **options) as model:
            return await work(model)

    return asyncio.run(main())


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("endless")
    return models.gguf(models.endless(directory / "base"), directory / "endless.gguf")


def test_answers_to_several_tasks_are_those_of_the_synchronous_runtime(artifact: Path) -> None:
    with load(artifact) as runtime:
        alone = [runtime.chat(ask(each), max_tokens=12).text() for each in QUESTIONS]
        plain = runtime.complete("dim the", sampling=HOT, max_tokens=12).text()

    async def work(model: AsyncRuntime) -> Any:
        answers = [model.chat(ask(each), max_tokens=12) for each in QUESTIONS]
        texts = await asyncio.gather(*(each.text() for each in answers))
        pieces = [piece async for piece in model.complete("dim the", sampling=HOT, max_tokens=12)]
        return texts, pieces, answers

    texts, pieces, answers = in_loop(artifact, work, slots=2)
    assert texts == alone
    assert "".join(pieces) == plain
    assert all(pieces)
    for each in answers:
        assert each.finish in (Finish.STOP, Finish.LENGTH)
        assert each.usage.prompt_tokens > 0
        assert len(each.tokens) <= each.usage.generated_tokens <= 12


def test_a_text_is_scored_while_answers_are_generated(artifact: Path) -> None:
    async def work(model: AsyncRuntime) -> Any:
        ids = model.runtime.tokenize("dim the bedroom lights")
        answer = model.chat(ask("dim the lights"), max_tokens=20)
        scores, text = await asyncio.gather(model.score(ids, top=2), answer.text())
        return ids, scores, text

    ids, scores, text = in_loop(artifact, work)
    with load(artifact) as runtime:
        (logits,) = runtime.score(np.array(ids, np.int32), np.arange(1, len(ids)))
        logits = logits.astype(np.float64)
        expected = (logits - np.log(np.exp(logits).sum(1, keepdims=True)))[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(scores.logprobs, expected, atol=1e-4)
    assert text


def test_a_task_that_is_cancelled_frees_its_place(endless: Path) -> None:
    async def work(model: AsyncRuntime) -> Any:
        answer = model.complete("dim", max_tokens=3000)
        task = asyncio.ensure_future(answer.text())
        while not answer.tokens:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        other = await asyncio.wait_for(model.complete("dim", max_tokens=3).text(), 30)
        return answer, other

    answer, other = in_loop(endless, work, slots=1)
    assert answer.finish is Finish.CANCEL
    assert len(answer.tokens) < 3000
    assert other


def test_an_answer_ends_where_it_is_cancelled(endless: Path) -> None:
    async def work(model: AsyncRuntime) -> Any:
        answer = model.complete("dim", max_tokens=3000)
        async for _ in answer:
            answer.cancel()
        return answer

    answer = in_loop(endless, work)
    assert answer.finish is Finish.CANCEL
    assert len(answer.tokens) < 3000


def test_what_is_generated_when_the_model_is_closed_is_cancelled(endless: Path) -> None:
    async def main() -> None:
        model = load_async(endless)
        answer = model.complete("dim", max_tokens=3000)
        await anext(answer)
        await model.close()
        await model.close()
        assert answer.finish is Finish.CANCEL
        with pytest.raises(EngineClosed, match="closed"):
            model.generate(edgetune.GenerationRequest([1, 2]))

    asyncio.run(main())


def test_reasoning_is_apart_from_the_answer(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base")
    template = models.TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    assert template != models.TEMPLATE
    (base / "chat_template.jinja").write_text(template, encoding="utf-8")
    path = models.gguf(base, tmp_path / "model.gguf")
    with load(path) as runtime:
        expected = runtime.chat(ask("good night"), sampling=HOT, max_tokens=16)
        assert expected.text() == ""

    async def work(model: AsyncRuntime) -> Any:
        answer = model.chat(ask("good night"), sampling=HOT, max_tokens=16)
        return answer, [part async for part in answer.parts()]

    answer, parts = in_loop(path, work)
    assert all(part.is_thought for part in parts)
    assert answer.thought == "".join(part.text for part in parts) == expected.thought != ""


def test_an_embedding_is_the_mean_of_the_hidden_states_or_the_last_one(file: Path) -> None:
    async def work(model: AsyncRuntime) -> Any:
        ids = model.runtime.tokenize("dim the bedroom lights")
        prefixes = [await model.embed(ids[: n + 1], pooling="last") for n in range(len(ids))]
        return prefixes, await model.embed(ids), await model.embed(ids, "last")

    prefixes, mean, last = in_loop(file, work)
    assert len(prefixes) > 3
    np.testing.assert_array_equal(last, prefixes[-1])
    np.testing.assert_allclose(mean, np.mean(prefixes, axis=0), atol=1e-4)
    assert not np.allclose(mean, last, atol=1e-2)


def test_a_graph_that_computes_no_hidden_states_refuses_embeddings(folder: Path) -> None:
    async def work(model: AsyncRuntime) -> None:
        await model.embed([1, 2, 3])

    with pytest.raises(RuntimeProblem, match="gives no hidden states") as caught:
        in_loop(folder, work)
    assert "GGUF" in str(caught.value.hint)


def test_bad_arguments_are_named(file: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeProblem, match="an engine of 0 slots"):
        load_async(file, slots=0)
    with load(file) as runtime, pytest.raises(RuntimeProblem, match="pooling is 'max'"):
        runtime.embed([1, 2], "max")  # type: ignore[arg-type]
    with pytest.raises(RuntimeProblem, match=r"there is no file .*none\.gguf"):
        load_async(tmp_path / "none.gguf")
