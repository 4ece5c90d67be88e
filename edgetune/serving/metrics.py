"""Counters of the server, in the text format of Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from edgetune.serving.conversation import TokenUsage
from edgetune.serving.loaded_files import LoadedModel, ModelPool

_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

_GUESSES = (
    ("drafted_tokens", "Tokens that were guessed ahead and verified, since the file was loaded."),
    ("guessed_tokens", "Those that were right, in answers that have ended."),
    ("near_ties", "Tokens that another one came near beside guesses: they were evaluated again without any."),
)


class Metrics:
    """What the server has done since its start."""

    def __init__(self) -> None:
        self.active = 0
        """Requests that are being answered."""
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: Counter[float] = Counter()
        self._seconds_sum = 0.0
        self._tokens: Counter[str] = Counter()
        self.disconnects = 0

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests[route, status] += 1
        self._seconds_sum += seconds
        self._seconds[next((limit for limit in _SECONDS if seconds <= limit), float("inf"))] += 1

    def count_tokens(self, usage: TokenUsage) -> None:
        """Count the tokens of a request."""
        self._tokens["prompt"] += usage.prompt
        self._tokens["cached"] += usage.cached
        self._tokens["generated"] += usage.generated

    def write(self, pool: ModelPool) -> str:
        """Return all metrics as text."""
        return "\n".join([*self._lines(pool), ""])

    def _lines(self, pool: ModelPool) -> Iterator[str]:
        yield from _metric(
            "requests_total", "counter", "Answered requests.",
            [(f'route="{route}",status="{code}"', count) for (route, code), count in sorted(self._requests.items())],
        )  # fmt: skip
        yield from self._histogram()
        yield from _metric(
            "tokens_total", "counter", "Tokens of prompts, those found in the cache, and generated ones.",
            [(f'kind="{kind}"', self._tokens[kind]) for kind in ("prompt", "cached", "generated")],
        )  # fmt: skip
        yield from _metric("active_requests", "gauge", "Requests that are being answered.", [("", self.active)])
        yield from _metric("disconnects_total", "counter", "Requests whose client went away.", [("", self.disconnects)])
        yield from _metric("model_loads_total", "counter", "Files that were loaded.", [("", pool.loads)])
        models = pool.loaded
        yield from _metric("loaded_bytes", "gauge", "Bytes of loaded files.", _by_model(models, "size"))
        for name, text in (("active", "decoded now"), ("waiting", "that wait for a slot")):
            rows = [(_label(model), getattr(model.engine.status, name)) for model in models]
            yield from _metric(f"slots_{name}", "gauge", f"Answers {text}.", rows)
        for name, kind in _GUESSES:
            rows = [(_label(model), getattr(model.engine.status, name)) for model in models]
            yield from _metric(f"{name}_total", "counter", kind, rows)

    def _histogram(self) -> Iterator[str]:
        name, total, rows = "request_seconds", 0, []
        for limit in (*_SECONDS, float("inf")):
            total += self._seconds[limit]
            rows.append((f'le="{"+Inf" if limit == float("inf") else limit}"', total))
        yield f"# HELP edgetune_{name} Time from request to the end of its reply."
        yield f"# TYPE edgetune_{name} histogram"
        yield from (f"edgetune_{name}_bucket{{{labels}}} {value}" for labels, value in rows)
        yield f"edgetune_{name}_sum {self._seconds_sum:.6f}"
        yield f"edgetune_{name}_count {total}"


def _by_model(models: Sequence[LoadedModel], attribute: str) -> list[tuple[str, float]]:
    return [(_label(model), getattr(model, attribute)) for model in models]


def _label(model: LoadedModel) -> str:
    escaped = model.file.name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'model="{escaped}"'


def _metric(name: str, kind: str, text: str, rows: Sequence[tuple[str, float]]) -> Iterator[str]:
    yield f"# HELP edgetune_{name} {text}"
    yield f"# TYPE edgetune_{name} {kind}"
    for labels, value in rows:
        yield f"edgetune_{name}{'{' + labels + '}' if labels else ''} {value}"
