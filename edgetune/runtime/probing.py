"""Measure how fast a file runs under settings that do not change its answers, one setting after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgetune.errors import RuntimeProblem
from edgetune.runtime.artifacts import artifact_format
from edgetune.runtime.loading import load
from edgetune.runtime.machine_fit import MachineFit, now
from edgetune.runtime.threads import physical_cores, usable_cpus

PROMPT, ANSWER = 256, 128
"""Tokens of the request whose time is compared."""
_STEPS = 16  # tokens of an answer that are measured
_REPETITIONS = 3  # of each candidate, in turn with the best so far; the fastest counts
_LEAST_GAIN = 0.03  # of the time, for another setting to be chosen
_LEAST_LOAD_GAIN = 0.25  # of the time to open the file, for a file that is not mapped: its memory is not shared
_MARGIN = 1.15  # on the costs of several rows: a guess has to be worth more than it seems to cost
ROWS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class RequestSpeed:
    """How fast a file runs.

    Attributes:
        prompt: Prompt tokens per second.
        answer: Answer tokens per second.
        load: Seconds to open the file.
    """

    prompt: float
    answer: float
    load: float

    @property
    def seconds(self) -> float:
        """Time of a request of `PROMPT` and `ANSWER` tokens."""
        return PROMPT / self.prompt + ANSWER / self.answer

    def best_with(self, other: RequestSpeed) -> RequestSpeed:
        """Return the better of each figure."""
        return RequestSpeed(max(self.prompt, other.prompt), max(self.answer, other.answer), min(self.load, other.load))


@dataclass(frozen=True)
class Trial:
    """A candidate that was measured.

    Attributes:
        setting: What is changed, in words; "defaults" for the first.
        fit: The settings.
        speed: How fast the file was with them; None if the runtime refuses them for this model.
        rival: How fast it was with the best settings until then, measured in turn.
        is_chosen: Whether it is faster than those by at least 3 %.
        is_choice: Whether it may be chosen; else it changes answers, and is measured for information.
    """

    setting: str
    fit: MachineFit
    speed: RequestSpeed | None
    rival: RequestSpeed
    is_chosen: bool
    is_choice: bool = True


def probe(path: Path, update: Callable[[int, int], None]) -> Iterator[Trial]:
    """Measure candidate after candidate; the last one that is chosen has the best settings.

    Args:
        path: A GGUF file or an ONNX folder.
        update: Called with the number of candidates that are done and of all.

    Raises:
        RuntimeProblem: The file cannot be run.
    """
    best = MachineFit()
    speed = _measure(path, best)
    with load(path, fit=best) as runtime:
        best = replace(best, threads=runtime.threads)
    yield Trial("defaults", best, speed, speed, is_chosen=True)
    candidates = _candidates(artifact_format(path) == "gguf")
    update(1, 1 + len(candidates))
    for number, (setting, change) in enumerate(candidates, start=2):
        fit = replace(best, **change)  # type: ignore[arg-type]
        if fit != best:
            trial = _compare(path, setting, best, fit)
            yield trial
            best = fit if trial.is_chosen else best
        update(number, 1 + len(candidates))


def _compare(path: Path, setting: str, best: MachineFit, fit: MachineFit) -> Trial:
    """Measure a candidate and the best settings so far in turn."""
    rival = _measure(path, best)
    try:
        speed = _measure(path, fit)
    except RuntimeProblem:
        return Trial(setting, fit, None, rival, is_chosen=False)
    for _ in range(_REPETITIONS - 1):
        rival, speed = rival.best_with(_measure(path, best)), speed.best_with(_measure(path, fit))
    is_choice = not fit.quantizes_cache
    if fit.maps_file == best.maps_file:
        is_chosen = is_choice and speed.seconds < rival.seconds * (1 - _LEAST_GAIN)
    else:  # an opened file is as fast either way
        is_chosen = speed.load < rival.load * (1 - _LEAST_LOAD_GAIN)
    return Trial(setting, fit, speed, rival, is_chosen, is_choice)


def _candidates(is_gguf: bool) -> list[tuple[str, dict[str, int | bool]]]:
    """Return what is tried, in words and as fields of `MachineFit`."""
    cores, logical = physical_cores(), usable_cpus()
    counts = sorted({1, max(1, cores // 2), cores, logical})
    found: list[tuple[str, dict[str, int | bool]]] = [
        (f"{count} thread{'s' if count > 1 else ''}", {"threads": count}) for count in counts
    ]
    if is_gguf:
        found += [
            ("weights not repacked", {"repacks": False}), ("no flash attention", {"flash_attention": False}),
            ("batches of 128", {"batch": 128}), ("file not mapped", {"maps_file": False}),
            ("cache in q8_0", {"quantizes_cache": True}),
        ]  # fmt: skip
    return found


def _measure(path: Path, fit: MachineFit) -> RequestSpeed:
    """Open the file and run a prompt and some tokens of an answer."""
    began = time.perf_counter()
    with load(path, context=_context(path), fit=fit) as runtime:
        opened = time.perf_counter()
        count = min(PROMPT, runtime.context - _STEPS - 1)
        ids = np.resize(np.arange(1, runtime.vocabulary_size, 7, dtype=np.int32), count)
        runtime.evaluate_prompt(ids[:8])
        start = time.perf_counter()
        runtime.evaluate_prompt(ids)
        prompted = time.perf_counter()
        for step in range(_STEPS):
            runtime.evaluate_token(int(ids[step]), count + step)
        ended = time.perf_counter()
    return RequestSpeed(count / (prompted - start), _STEPS / (ended - prompted), opened - began)


def _context(path: Path) -> int | None:
    """Return the context of the measurement; ONNX graphs may have rotary tables for fewer tokens."""
    return PROMPT + _STEPS + 32 if artifact_format(path) == "gguf" else None


def measure_costs(path: Path, fit: MachineFit) -> MachineFit:
    """Return settings with the time of batches of several rows, and the time of the measurement."""
    with load(path, context=_context(path), fit=fit) as runtime:
        ids = np.resize(np.arange(1, runtime.vocabulary_size, 7, dtype=np.int32), 64)
        seconds: list[float] = []
        for rows in ROWS:
            found = []
            runtime.evaluate_prompt(ids)
            for _ in range(2 * _REPETITIONS):
                start = time.perf_counter()
                if not runtime.evaluate_rows(ids[:rows], len(ids)):
                    return replace(fit, measured=now())
                if rows > 1:  # llama.cpp builds its graph again when the number of rows changes, as it does here
                    runtime.evaluate_rows(ids[:1], len(ids))
                found.append(time.perf_counter() - start)
            seconds.append(min(found) - (seconds[0] if seconds else 0))
    relative = [1.0, *(max(1.0, _MARGIN * each / seconds[0]) for each in seconds[1:])]
    return replace(fit, costs=tuple(round(each, 3) for each in relative), measured=now())
