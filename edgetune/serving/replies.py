"""Replies: one JSON object, or a stream of events that ends when the client goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.types import Receive, Send

from edgetune.serving.api_errors import ApiError

KEEPALIVE_SECONDS = 15.0
WRITE_SECONDS = 60.0
"""A client that takes nothing for so long is gone."""

T = TypeVar("T")


def time_is_up() -> ApiError:
    """Return the error of a request that takes longer than the server permits."""
    return ApiError(503, "the answer took longer than this server permits (see --request-timeout)", code="timeout")


class ClientGone(Exception):
    """The client has closed the connection."""


def to_json(value: Any) -> bytes:
    """Return JSON in UTF-8; half a surrogate pair, which UTF-8 cannot write, is escaped."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


@dataclass(frozen=True)
class Event:
    """An event of a stream; a name is only written in server-sent events."""

    data: Any
    name: str | None = None


DONE = Event("[DONE]")
"""The end of a stream of OpenAI's API."""


def _as_sse(event: Event) -> bytes:
    data = b"[DONE]" if event is DONE else to_json(event.data)
    name = b"" if event.name is None else b"event: " + event.name.encode() + b"\n"
    return name + b"data: " + data + b"\n\n"


@dataclass(frozen=True)
class Framing:
    """How events are written."""

    media_type: str
    write: Callable[[Event], bytes]
    keepalive: bytes = b""
    """Sent while there is nothing to say."""


SSE = Framing("text/event-stream; charset=utf-8", _as_sse, b": keep-alive\n\n")
NDJSON = Framing("application/x-ndjson", lambda event: to_json(event.data) + b"\n")
ANTHROPIC_SSE = Framing(SSE.media_type, _as_sse, b'event: ping\ndata: {"type":"ping"}\n\n')


@dataclass(frozen=True)
class Stream:
    """A reply in events. The first one is awaited before the status is sent, so that an early error has its own."""

    events: AsyncIterator[Event]
    framing: Framing
    on_error: Callable[[ApiError], list[Event]]
    """The last events of a stream that fails."""


@dataclass(frozen=True)
class Raw:
    """A reply that is not JSON."""

    body: bytes
    media_type: str


@dataclass
class Reply:
    """What is sent: headers, then a body or a stream."""

    content: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


async def send_body(reply: Reply, send: Send, *, head: bool = False) -> None:
    """Send a reply that is no stream."""
    raw = reply.content if isinstance(reply.content, Raw) else Raw(to_json(reply.content), "application/json")
    headers = {"content-type": raw.media_type, "content-length": str(len(raw.body)), **reply.headers}
    await send({"type": "http.response.start", "status": reply.status, "headers": _encode(headers)})
    await send({"type": "http.response.body", "body": b"" if head else raw.body})


def _encode(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers.items()]


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has closed the connection. The body has been read by then."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(work: Awaitable[T], receive: Receive) -> T:
    """Await `work`; cancel it and raise ClientGone when the client closes the connection."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


async def send_stream(
    first: Event | None, stream: Stream, headers: Mapping[str, str], resources: AsyncExitStack, deadline: float,
    receive: Receive, send: Send,
) -> None:  # fmt: skip
    """Send a stream whose first event is known. Release `resources` at its end, also when the client goes away.

    At the deadline, in seconds of the event loop's clock, the stream ends with an error.
    """
    all_headers = {
        "content-type": stream.framing.media_type, "cache-control": "no-store", "x-accel-buffering": "no", **headers,
    }  # fmt: skip
    async with resources, aclosing(stream.events):  # type: ignore[type-var]
        await send({"type": "http.response.start", "status": 200, "headers": _encode(all_headers)})
        await unless_disconnected(_write_events(first, stream, deadline, send), receive)
        await _write(send, b"", more=False)


async def _write_events(first: Event | None, stream: Stream, deadline: float, send: Send) -> None:
    if first is not None:
        await _write(send, stream.framing.write(first))
    try:
        async for event in _with_keepalive(stream, deadline):
            await _write(send, stream.framing.keepalive if event is None else stream.framing.write(event))
    except ApiError as error:
        for event in stream.on_error(error):
            await _write(send, stream.framing.write(event))


async def _with_keepalive(stream: Stream, deadline: float) -> AsyncIterator[Event | None]:
    """Yield the events, and None where none has come for a while."""
    pending: asyncio.Task[Event | None] | None = None
    try:
        while True:
            pending = pending or asyncio.create_task(next_event(stream.events))
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                raise time_is_up()
            done, _ = await asyncio.wait({pending}, timeout=min(left, KEEPALIVE_SECONDS))
            if done:
                event, pending = pending.result(), None
                if event is None:
                    return
                yield event
            elif stream.framing.keepalive:
                yield None
    finally:
        if pending is not None:
            pending.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await pending


async def next_event(events: AsyncIterator[Event]) -> Event | None:
    """Return the next event; None at the end."""
    return await anext(events, None)


async def _write(send: Send, data: bytes, *, more: bool = True) -> None:
    try:
        async with asyncio.timeout(WRITE_SECONDS):
            await send({"type": "http.response.body", "body": data, "more_body": more})
    except TimeoutError:
        raise ClientGone from None
