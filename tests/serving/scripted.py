"""A server whose model says what a test has written, token by token, through the real runtime's vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgetune.runtime import Finish, Runtime, load
from edgetune.runtime.engine import Engine, EngineStatus, GenerationRequest, Ticket, TokenEvent, Usage
from edgetune.serving.calls import ServerSettings
from edgetune.serving.loaded_files import LoadSettings, ServedFile
from tests.serving.conftest import Running, running


class ScriptedEngine:
    """Answers each request with the next bytes of a script, a few at a time."""

    def __init__(self, runtime: Runtime, script: list[bytes], width: int) -> None:
        self.runtime, self._script, self._width = runtime, script, width
        self.requests: list[GenerationRequest] = []

    def submit(self, request: GenerationRequest) -> Ticket:
        self.requests.append(request)
        raw = self._script.pop(0)
        ticket = Ticket(request, lambda: None)
        pieces = [raw[at : at + self._width] for at in range(0, len(raw), self._width)]
        shown = pieces[: request.max_tokens]
        events = [TokenEvent(20, piece, -0.5 if request.logprobs is not None else None) for piece in shown]
        is_cut = len(pieces) > request.max_tokens
        usage = Usage(len(request.ids), 0, len(shown))
        ticket.measure_by(lambda: usage)
        ticket.end(events, Finish.LENGTH if is_cut else Finish.STOP)
        return ticket

    @property
    def status(self) -> EngineStatus:
        return EngineStatus(1, 0, 0, 0, 0, 0, 0)

    def close(self, deadline: float = 0.0) -> None:
        """Do nothing."""


@contextmanager
def scripted(file: Path, *script: str | bytes, width: int = 3, **settings: Any) -> Iterator[tuple[Running, Any]]:
    """Serve a file whose answers are those of the script; yield the server and the engine's list of requests."""
    answers = [each.encode() if isinstance(each, str) else each for each in script]
    seen: list[GenerationRequest] = []

    def open_model(served: ServedFile, load_settings: LoadSettings) -> tuple[Runtime, Engine]:
        runtime = load(served.path, threads=1)
        engine: Any = ScriptedEngine(runtime, answers, width)
        engine.requests = seen
        return runtime, engine

    with running(file, settings=ServerSettings(**settings), open_model=open_model) as server:
        yield server, seen
