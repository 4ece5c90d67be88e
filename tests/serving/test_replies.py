"""Writing the events of a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from edgetune.serving.api_errors import bad_request, openai_error
from edgetune.serving.replies import SSE, ClientGone, Event, Stream, TextTemplate, send_stream, to_json


async def never(*_: Any) -> Any:
    await asyncio.Event().wait()


def write(events: AsyncIterator[Event], *, pause: float = 0.0, seconds: float = 10.0) -> list[bytes]:
    """Return the pieces that are sent to a client who needs `pause` seconds for each."""
    pieces: list[bytes] = []

    async def send(message: Any) -> None:
        if "body" in message:
            pieces.append(message["body"])
            await asyncio.sleep(pause)

    async def run() -> None:
        deadline = asyncio.get_running_loop().time() + seconds
        stream = Stream(events, SSE, lambda error: [Event(openai_error(error))])
        await send_stream(Event(0), stream, {}, AsyncExitStack(), deadline, never, send)

    asyncio.run(run())
    assert pieces.pop() == b""
    return pieces


async def numbers(count: int, pause: float = 0.0) -> AsyncIterator[Event]:
    for number in range(1, count + 1):
        if pause:
            await asyncio.sleep(pause)
        yield Event(number)


def sse(*values: int) -> bytes:
    return b"".join(b"data: %d\n\n" % value for value in values)


def test_events_that_wait_are_sent_together_and_in_order() -> None:
    assert write(numbers(50)) == [sse(*range(51))]
    pieces = write(numbers(50, pause=0.001), pause=0.02)
    assert b"".join(pieces) == sse(*range(51))
    assert len(pieces) < 30


def test_an_event_does_not_wait_for_the_next_one() -> None:
    assert write(numbers(3, pause=0.05)) == [sse(0), sse(1), sse(2), sse(3)]


def test_a_slow_client_stops_the_reading_of_events() -> None:
    seen: list[int] = []

    async def large() -> AsyncIterator[Event]:
        for number in range(20):
            seen.append(number)
            yield Event("x" * 100_000)

    async def run() -> None:
        stream = Stream(large(), SSE, lambda error: [])
        deadline = asyncio.get_running_loop().time() + 0.2
        await asyncio.wait_for(send_stream(None, stream, {}, AsyncExitStack(), deadline, never, stuck), 0.2)

    with pytest.raises(TimeoutError):
        asyncio.run(run())
    assert len(seen) < 8


async def stuck(message: Any) -> None:
    if "body" in message:
        await never()


def test_a_client_that_takes_nothing_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.serving.replies.WRITE_SECONDS", 0.05)

    async def run() -> None:
        stream = Stream(numbers(3), SSE, lambda error: [])
        deadline = asyncio.get_running_loop().time() + 60
        await send_stream(None, stream, {}, AsyncExitStack(), deadline, never, stuck)

    with pytest.raises(ClientGone):
        asyncio.run(run())


def test_silence_is_filled_with_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.serving.replies.KEEPALIVE_SECONDS", 0.05)
    pieces = write(numbers(1, pause=0.3))
    assert pieces[0] == sse(0)
    assert pieces[-1] == sse(1)
    assert set(pieces[1:-1]) == {SSE.keepalive}


def test_at_the_deadline_the_stream_ends_with_an_error() -> None:
    pieces = write(numbers(100, pause=0.02), seconds=0.1)
    assert pieces[:2] == [sse(0), sse(1)]
    assert b"took longer than this server permits" in pieces[-1]
    silent = write(numbers(1, pause=100), seconds=0.1)
    assert b"took longer than this server permits" in silent[-1]


def test_an_error_of_the_request_ends_the_stream_after_its_events() -> None:
    async def failing() -> AsyncIterator[Event]:
        yield Event(1)
        raise bad_request("no")

    text = b"".join(write(failing()))
    assert text.startswith(sse(0, 1))
    assert b'"message":"no"' in text


def test_an_unexpected_error_is_raised_after_the_events_before_it() -> None:
    async def failing() -> AsyncIterator[Event]:
        yield Event(1)
        raise KeyError("x")

    with pytest.raises(KeyError):
        write(failing())


@pytest.mark.parametrize("text", ["", "plain", 'quotes " and \\', "灯 👍🏽", "line\nline", "\ud83d half", "</script>"])
def test_a_filled_template_is_the_json_of_its_value(text: str) -> None:
    template = TextTemplate(lambda text: {"id": "a", "choices": [{"index": 0, "delta": {"content": text}}]})
    assert template.fill(text) == to_json({"id": "a", "choices": [{"index": 0, "delta": {"content": text}}]})
