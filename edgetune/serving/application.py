"""The application: one table of routes, and what happens around each call."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgetune import console
from edgetune.errors import EdgetuneError
from edgetune.serving.api_errors import ApiError, ErrorFormat, format_of, from_problem
from edgetune.serving.calls import Call, RouteSpec, Server
from edgetune.serving.dialects import (
    anthropic_messages,
    native,
    ollama,
    openai_chat,
    openai_completions,
    openai_embeddings,
    openai_responses,
)
from edgetune.serving.replies import (
    ClientGone,
    Event,
    Reply,
    Stream,
    send_body,
    send_stream,
    time_is_up,
    to_json,
    unless_disconnected,
)
from edgetune.serving.request_fields import parse, unknown_fields

ROUTES: tuple[RouteSpec, ...] = (
    *openai_chat.ROUTES, *openai_completions.ROUTES, *openai_responses.ROUTES, *openai_embeddings.ROUTES,
    *anthropic_messages.ROUTES, *ollama.ROUTES, *native.ROUTES,
)  # fmt: skip
"""Everything that can be asked."""

_IGNORED_HEADER = "x-edgetune-ignored-fields"


def make_application(server: Server) -> ASGIApp:
    """Return the ASGI application."""
    by_path: dict[str, list[RouteSpec]] = {}
    for route in ROUTES:
        by_path.setdefault(route.path, []).append(route)
    endpoints = [Route(path, _Endpoint(server, routes)) for path, routes in by_path.items()]
    application = Starlette(routes=endpoints, exception_handlers={HTTPException: _not_found})
    return _Guard(application, server)


async def _not_found(request: Request, error: Exception) -> Response:
    path = request.url.path
    found = ApiError(404, f"there is no {request.method} {path}")
    return Response(to_json(format_of(path)(found)), 404, media_type="application/json")


class _Guard:
    """Checks who asks before anything else is done, and counts the requests that are being answered."""

    def __init__(self, application: ASGIApp, server: Server) -> None:
        self._application, self._server = application, server
        self._open_paths = {route.path for route in ROUTES if route.is_open}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        server, headers, path = self._server, Headers(scope=scope), scope["path"]
        access = server.settings.access
        try:
            access.check_host(headers)
            if scope["method"] == "OPTIONS":
                await send_body(Reply(None, headers=access.preflight_headers(headers)), send)
                return
            access.check_origin(headers, scope["scheme"])
            if path not in self._open_paths:
                access.check_key(headers)
                self._require_room()
        except ApiError as error:
            await _send_error(error, format_of(path), send, headers, access.cors_headers(headers))
            return
        server.metrics.active += 1
        try:
            await self._application(scope, receive, _with_headers(send, access.cors_headers(headers)))
        finally:
            server.metrics.active -= 1

    def _require_room(self) -> None:
        server = self._server
        if server.is_draining:
            raise ApiError(503, "the server is shutting down")
        if server.metrics.active >= server.settings.max_requests:
            raise ApiError(503, f"the server answers {server.metrics.active} requests already; try again")


def _with_headers(send: Send, more: Mapping[str, str]) -> Send:
    if not more:
        return send

    async def send_more(message: Message) -> None:
        if message["type"] == "http.response.start":
            encoded = [(name.encode(), value.encode("latin-1")) for name, value in more.items()]
            message = {**message, "headers": [*message["headers"], *encoded]}
        await send(message)

    return send_more


class _Endpoint:
    """Answers the calls of one path."""

    def __init__(self, server: Server, routes: Sequence[RouteSpec]) -> None:
        self._server = server
        self._routes = {route.method: route for route in routes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope["method"]
        route = self._routes.get("GET" if method == "HEAD" else method)
        if route is None:
            allowed = ", ".join(self._routes)
            error = ApiError(405, f"{scope['path']} is for {allowed}, not {method}", allow=allowed)
            await _send_error(error, format_of(scope["path"]), send)
            return
        started = time.monotonic()
        status = _Status(send)
        try:
            await self._answer(route, scope, receive, status.send)
        except ClientGone:
            self._server.metrics.disconnects += 1
            status.code = status.code or 499
        except ApiError as error:
            await _send_error(error, route.error, status.send)
        except EdgetuneError as problem:
            await _send_error(from_problem(problem), route.error, status.send)
        except OSError:  # the connection broke
            status.code = status.code or 499
        except Exception:
            console.stderr().print(traceback.format_exc(), markup=False)
            if status.code:
                raise
            await _send_error(ApiError(500, "an internal error; see the server's output"), route.error, status.send)
        finally:
            self._server.metrics.count_request(route.path, status.code, time.monotonic() - started)

    async def _answer(self, route: RouteSpec, scope: Scope, receive: Receive, send: Send) -> None:
        settings = self._server.settings
        deadline = asyncio.get_running_loop().time() + settings.request_seconds
        headers = Headers(scope=scope)
        body = await _read_body(receive, headers, settings.max_body, settings.body_seconds)
        fields = parse(route.fields, body)
        async with AsyncExitStack() as resources:
            call: Call[Any] = Call(self._server, fields, scope["path_params"], headers, resources)
            call.note(_IGNORED_HEADER, unknown_fields(fields))
            try:
                async with asyncio.timeout_at(deadline):
                    content, first = await unless_disconnected(_begin(route, call), receive)
            except TimeoutError:
                raise time_is_up() from None
            if isinstance(content, Stream):
                owned = resources.pop_all()
                await send_stream(first, content, call.reply_headers, owned, deadline, receive, send)
                return
        await send_body(Reply(content, headers=call.reply_headers), send, head=scope["method"] == "HEAD")


async def _begin(route: RouteSpec, call: Call[Any]) -> tuple[Any, Event | None]:
    """Return the content of a reply, and the first event of a stream."""
    content = await route.handle(call)
    return content, await anext(content.events, None) if isinstance(content, Stream) else None


class _Status:
    """Notes the status that is sent."""

    def __init__(self, send: Send) -> None:
        self._send, self.code = send, 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.code = message["status"]
        await self._send(message)


async def _send_error(
    error: ApiError, form: ErrorFormat, send: Send, headers: Mapping[str, str] | None = None,
    more: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    close = {"connection": "close"} if error.status in (408, 413) or headers is not None else {}
    with suppress(OSError):
        await send_body(Reply(form(error), error.status, {**error.headers, **close, **(more or {})}), send)


async def _read_body(receive: Receive, headers: Mapping[str, str], most: int, seconds: float) -> bytes:
    """Return the body of a request.

    Raises:
        ApiError: It is too large, or does not arrive in time.
        ClientGone: The client closed the connection before its end.
    """
    length = headers.get("content-length", "")
    if length.isdigit() and int(length) > most:
        raise _too_large(most)
    pieces, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for piece in _body_pieces(receive):
                size += len(piece)
                if size > most:
                    raise _too_large(most)
                pieces.append(piece)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {seconds:g} seconds") from None
    return b"".join(pieces)


async def _body_pieces(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        yield message.get("body", b"")
        more = message.get("more_body", False)


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than the {most} bytes that this server reads (see --max-body)")
