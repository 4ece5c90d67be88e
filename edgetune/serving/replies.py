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
_MOST_PENDING = 1 << 18
"""Bytes of events that may wait for a slow client; then no more are read."""

T = TypeVar("T")


def time_is_up() -> ApiError:
    """Return the error of a request that takes longer than the server permits."""
    return ApiError(503, "the answer took longer than this server permits (see --request-timeout)", code="timeout")


class ClientGone(Exception):
    """The client has closed the connection."""


_ENCODERS = tuple(
    json.JSONEncoder(ensure_ascii=is_ascii, separators=(",", ":"), allow_nan=False) for is_ascii in (False, True)
)
"""json.dumps makes one for each call."""


class EncodedJson(bytes):
    """A value that is JSON already."""


def to_json(value: Any) -> bytes:
    """Return JSON in UTF-8; half a surrogate pair, which UTF-8 cannot write, is escaped."""
    if isinstance(value, EncodedJson):
        return value
    plain, escaped = _ENCODERS
    try:
        return plain.encode(value).encode()
    except UnicodeEncodeError:
        return escaped.encode(value).encode()


@dataclass(frozen=True)
class Event:
    """An event of a stream; a name is only written in server-sent events."""

    data: Any
    name: str | None = None


class TextTemplate:
    """A JSON value of which one text changes: the rest is encoded once."""

    _MARK = "text-8d02c4"

    def __init__(self, build: Callable[[str], Any]) -> None:
        """Take the value that `build` returns for a text."""
        self._before, _, self._after = to_json(build(self._MARK)).partition(to_json(self._MARK))

    def fill(self, text: str) -> EncodedJson:
        """Return the value with another text."""
        return EncodedJson(self._before + to_json(text) + self._after)


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
        await unless_disconnected(_EventWriter(stream, deadline, send).write(first), receive)


class _EventWriter:
    """Writes a stream. Events that came while the last ones were written are sent together."""

    def __init__(self, stream: Stream, deadline: float, send: Send) -> None:
        self._stream, self._deadline, self._send = stream, deadline, send
        self._loop = asyncio.get_running_loop()
        self._pending: list[bytes] = []
        self._size = 0
        """Bytes that are pending."""
        self._has_news, self._has_room = asyncio.Event(), asyncio.Event()
        self._written, self._is_writing = self._loop.time(), False
        """When the last writing began, and whether it goes on."""

    async def write(self, first: Event | None) -> None:
        """Write all events, and an error at the deadline. Raises ClientGone for a client that takes nothing."""
        reading = asyncio.create_task(self._read(first))
        reading.add_done_callback(lambda _: self._has_news.set())
        try:
            async with asyncio.timeout(None) as limit:
                self._watch(limit)
                await self._write_all(reading)
        except TimeoutError:
            raise ClientGone from None
        finally:
            self._timer.cancel()
            await _stop(reading)

    async def _read(self, first: Event | None) -> None:
        if first is not None:
            self._add(first)
        try:
            async for event in self._stream.events:
                self._add(event)
                while self._size > _MOST_PENDING:
                    self._has_room.clear()
                    await self._has_room.wait()
        except ApiError as error:
            self._add(*self._stream.on_error(error))

    def _add(self, *events: Event) -> None:
        for event in events:
            data = self._stream.framing.write(event)
            self._pending.append(data)
            self._size += len(data)
        self._has_news.set()

    def _watch(self, limit: asyncio.Timeout) -> None:
        """Look at the time now and then, which costs less than a timer for each event."""
        now = self._loop.time()
        if self._is_writing and now >= self._written + WRITE_SECONDS:
            limit.reschedule(now)
            return
        self._has_news.set()
        later = now + min(KEEPALIVE_SECONDS, WRITE_SECONDS) / 3
        at = min(later, self._deadline) if now < self._deadline else later
        self._timer = self._loop.call_at(at, self._watch, limit)

    async def _write_all(self, reading: asyncio.Task[None]) -> None:
        keepalive = self._stream.framing.keepalive
        while True:
            now = self._loop.time()
            if now >= self._deadline and not reading.done():
                await _stop(reading)
                self._add(*self._stream.on_error(time_is_up()))
            if self._pending:
                data = b"".join(self._pending)
                self._pending, self._size = [], 0
                self._has_room.set()
                await self._write(data, now)
            elif reading.done():
                if not reading.cancelled():
                    reading.result()
                await self._write(b"", now, more=False)
                return
            elif keepalive and now >= self._written + KEEPALIVE_SECONDS:
                await self._write(keepalive, now)
            else:
                self._has_news.clear()
                await self._has_news.wait()

    async def _write(self, data: bytes, now: float, *, more: bool = True) -> None:
        self._written, self._is_writing = now, True
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self._is_writing = False


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await task
