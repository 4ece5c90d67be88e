"""Measure prompts, answers and parallel streams of one model through the `Engine`, as `chat` and `serve` run it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import NamedTuple

import numpy as np

from edgetune.errors import RuntimeProblem
from edgetune.runtime import load
from edgetune.runtime.engine import Engine, GenerationRequest, Usage
from edgetune.runtime.machine_fit import MachineFit

STREAM_PROMPT, STREAM_ANSWER = 64, 32
"""Tokens of the prompt and of the answer of each parallel stream."""
_BESIDE = 2  # tokens of the context beside those that are measured: a first one, and one more to choose


@dataclass(frozen=True)
class BenchPlan:
    """What is measured.

    Attributes:
        prompts: Lengths of prompts to evaluate, in tokens.
        answers: Lengths of answers to generate, in tokens.
        streams: Numbers of parallel streams.
        threads: Numbers of threads.
        rounds: Rounds of each measurement, after one that is not counted.
        fit: Settings that `edgetune fit` remembered; None: the defaults.
    """

    prompts: Sequence[int]
    answers: Sequence[int]
    streams: Sequence[int]
    threads: Sequence[int]
    rounds: int
    fit: MachineFit | None = None

    @property
    def count(self) -> int:
        """Number of measurements."""
        return len(self.threads) * (len(self.prompts) + len(self.answers) + len(self.streams))


@dataclass(frozen=True)
class Speed:
    """The speed of one measurement.

    Attributes:
        test: Its name: pp512 for a prompt, tg128 for an answer, 4 streams.
        threads: Threads that evaluated the model.
        samples: Tokens per second of each round; those of all streams together.
        prompt_tokens: Tokens of each prompt.
        answer_tokens: Tokens of each answer that are counted.
        streams: Answers that were generated at the same time.
        together: Those that were decoded together at most.
        first_token: Median of the seconds from a request to its first token; None for a prompt and an answer.
    """

    test: str
    threads: int
    samples: tuple[float, ...]
    prompt_tokens: int
    answer_tokens: int
    streams: int = 1
    together: int = 1
    first_token: float | None = None

    @property
    def mean(self) -> float:
        """Mean of the rounds, in tokens per second."""
        return fmean(self.samples)

    @property
    def deviation(self) -> float:
        """Standard deviation of the rounds, with n - 1; 0 for one round."""
        return stdev(self.samples) if len(self.samples) > 1 else 0.0

    @property
    def is_decoding(self) -> bool:
        """Whether the time is that of decoding one answer alone."""
        return self.answer_tokens > 0 and self.first_token is None


class BenchModel(NamedTuple):
    """What is known of a model before it is measured.

    Attributes:
        format: "gguf" or "onnx".
        size: Bytes of the model.
        threads: Default number of threads.
        longest: Tokens of the longest text that can be measured.
    """

    format: str
    size: int
    threads: int
    longest: int


def read_facts(path: Path, fit: MachineFit | None = None) -> BenchModel:
    """Open the model once. Raises RuntimeProblem if it cannot be run, ArtifactError if it is damaged."""
    with load(path, fit=fit) as runtime:
        return BenchModel(runtime.format, runtime.size, runtime.threads, runtime.trained_context - _BESIDE)


def check_plan(path: Path, plan: BenchPlan, facts: BenchModel) -> None:
    """Raise RuntimeProblem if a text of the plan is longer than the model was trained for."""
    stream = STREAM_PROMPT + STREAM_ANSWER if plan.streams else 0
    longest = max((*plan.prompts, *plan.answers, stream))
    if longest > facts.longest:
        hint = f"; streams take {stream} (--streams 0)" if stream > facts.longest else ""
        raise RuntimeProblem(
            f"{longest} tokens are to be measured, but {path} was made for {facts.longest + _BESIDE}",
            f"Give at most {facts.longest} with -p and -n{hint}",
        )


def measure_speeds(path: Path, plan: BenchPlan) -> Iterator[Speed]:
    """Yield the measurements, one after another.

    Raises:
        RuntimeProblem: The file cannot be run.
        ArtifactError: The file is damaged.
    """
    for threads in plan.threads:
        if longest := max((*plan.prompts, *plan.answers), default=0):
            context = max(8, longest + _BESIDE)
            with (
                load(path, threads=threads, context=context, fit=plan.fit) as runtime,
                Engine(runtime, slots=1) as engine,
            ):
                bench = _Bench(engine, plan.rounds)
                yield from map(bench.measure_prompt, plan.prompts)
                yield from map(bench.measure_answer, plan.answers)
        if plan.streams:
            context = STREAM_PROMPT + STREAM_ANSWER + _BESIDE
            with load(path, threads=threads, context=context, fit=plan.fit) as runtime:
                for count in plan.streams:
                    with Engine(runtime, slots=count, queue=count) as engine:
                        yield _Bench(engine, plan.rounds).measure_streams(count)


class _Bench:
    """Measures with one engine. Prompts are random, so that none is found in the cache."""

    def __init__(self, engine: Engine, rounds: int) -> None:
        self._engine, self._rounds = engine, rounds
        self._random = np.random.default_rng(0)

    def measure_prompt(self, count: int) -> Speed:
        """Measure the time from a prompt to its first token."""
        samples = self._measure(lambda: count / self._generate(count, 1).prompt_seconds)
        return Speed(f"pp{count}", self._threads, samples, count, 0)

    def measure_answer(self, count: int) -> Speed:
        """Measure the time of all tokens behind the first, after a prompt of one token."""
        samples = self._measure(lambda: count / self._generate(1, count + 1).decode_seconds)
        return Speed(f"tg{count}", self._threads, samples, 0, count)

    def _measure(self, measure: Callable[[], float]) -> tuple[float, ...]:
        measure()
        return tuple(measure() for _ in range(self._rounds))

    @property
    def _threads(self) -> int:
        return self._engine.runtime.threads

    def _generate(self, prompt: int, answer: int) -> Usage:
        ticket = self._engine.submit(self._request(prompt, answer))
        ticket.wait()
        return ticket.usage

    def _request(self, prompt: int, answer: int) -> GenerationRequest:
        ids = self._random.integers(0, self._engine.runtime.vocabulary_size, prompt).tolist()
        return GenerationRequest(ids, max_tokens=answer, ignore_eos=True)

    def measure_streams(self, count: int) -> Speed:
        """Measure answers that are submitted at the same time, until the last one ends, with their prompts."""
        first_tokens: list[float] = []

        def measure() -> float:
            requests = [self._request(STREAM_PROMPT, STREAM_ANSWER) for _ in range(count)]
            begun = time.perf_counter()
            tickets = [self._engine.submit(request) for request in requests]
            for ticket in tickets:
                ticket.wait()
            seconds = time.perf_counter() - begun
            first_tokens.extend(each.usage.queued_seconds + each.usage.prompt_seconds for each in tickets)
            return count * STREAM_ANSWER / seconds

        name = f"{count} stream{'s' if count > 1 else ''}"
        samples = self._measure(measure)
        together = min(count, self._engine.status.slots)
        return Speed(
            name, self._threads, samples, STREAM_PROMPT, STREAM_ANSWER, count, together, median(first_tokens[count:])
        )
