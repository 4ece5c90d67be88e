"""Run the application: a socket, uvicorn, and a shutdown that finishes or cuts streams by a deadline."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from edgetune import console
from edgetune.errors import EnvironmentProblem, RuntimeProblem
from edgetune.serving.api_errors import ApiError
from edgetune.serving.application import make_application
from edgetune.serving.calls import Server

_BACKLOG = 256
_CUT_SECONDS = 2
"""In which streams that were cut send their last event."""
_HEADER_BYTES = 64 << 10


@dataclass(frozen=True)
class ListenSettings:
    """Where the server listens.

    Attributes:
        host: Name or address.
        port: Port; 0 chooses a free one.
    """

    host: str = "127.0.0.1"
    port: int = 8080


def bind(settings: ListenSettings) -> socket.socket:
    """Return a listening socket.

    Raises:
        EnvironmentProblem: The address is in use, or is none of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        opened = socket.socket(family, kind, protocol)
    except OSError as error:
        raise EnvironmentProblem(f"--host {settings.host} cannot be used: {error.strerror or error}") from None
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(_BACKLOG)
    except OSError as error:
        opened.close()
        raise EnvironmentProblem(
            f"{settings.host}:{settings.port} cannot be listened on: {error.strerror or error}",
            "Stop the other server, or give another --port",
        ) from None
    opened.setblocking(False)
    return opened


def url_of(listening: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(server: Server, listening: socket.socket, shutdown_seconds: float, *, preload: bool = False) -> None:
    """Answer requests until SIGINT or SIGTERM.

    Args:
        server: What is served.
        listening: A socket of `bind`.
        shutdown_seconds: Time for running answers after the signal; then they are cut.
        preload: Whether all files are loaded first.

    Raises:
        RuntimeProblem: A file cannot be loaded at the start.
    """

    async def run() -> None:
        for name in server.pool.files if preload else ():
            try:
                async with server.pool.use(name):
                    pass
            except ApiError as error:
                raise RuntimeProblem(error.message) from None
        await make_uvicorn(server, shutdown_seconds).serve(sockets=[listening])

    asyncio.run(run())


def make_uvicorn(server: Server, shutdown_seconds: float) -> uvicorn.Server:
    """Return the HTTP server of the application."""
    config = uvicorn.Config(
        make_application(server), http="h11", ws="none", lifespan="off", log_config=None, access_log=False,
        server_header=False, proxy_headers=False, h11_max_incomplete_event_size=_HEADER_BYTES,
        timeout_keep_alive=30, timeout_graceful_shutdown=_CUT_SECONDS, backlog=_BACKLOG,
    )  # fmt: skip
    return _Uvicorn(config, server, shutdown_seconds)


class _Uvicorn(uvicorn.Server):
    """uvicorn with a shutdown in two steps: running answers go on until the deadline, then they are cut."""

    def __init__(self, config: uvicorn.Config, server: Server, shutdown_seconds: float) -> None:
        super().__init__(config)
        self._server, self._shutdown_seconds = server, shutdown_seconds

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at SIGINT and SIGTERM, and exit normally afterwards; the second signal cuts running answers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _stop(self, *_: object) -> None:
        self._server.is_draining = True
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, wait for running answers, cut those that remain, and free the models."""
        for listener in self.servers:
            listener.close()
        metrics = self._server.metrics
        if metrics.active:
            console.note(f"stopping; {metrics.active} running answers have {self._shutdown_seconds:g} seconds")
        deadline = asyncio.get_running_loop().time() + self._shutdown_seconds
        while metrics.active and not self.force_exit and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        await self._server.pool.cut()
        self.force_exit = False
        await super().shutdown(sockets)
        if not metrics.active:
            await self._server.pool.close()
