"""Who may ask, and how much: Host, Origin, key, size, queue, time."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from edgetune.serving.calls import ServerSettings
from edgetune.serving.security import AccessRules
from tests.serving.conftest import Running, running

ASK = {"messages": [{"role": "user", "content": "dim the lights"}], "temperature": 0}
PAGE = "https://page.example"


@pytest.fixture(scope="module")
def guarded(file: Path) -> Iterator[Running]:
    access = AccessRules(frozenset({"lamp.example"}), frozenset({PAGE}), "secret")
    with running(file, settings=ServerSettings(access, max_body=10_000)) as server:
        yield server


KEY = {"authorization": "Bearer secret"}


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "", "127.0.0.1.nip.io", "["]
)
def test_a_host_that_is_not_the_servers_is_refused(guarded: Running, host: str) -> None:
    reply = httpx.get(guarded.v1 + "/models", headers={**KEY, "host": host})
    assert reply.status_code in (400, 403)
    assert "tiny" not in reply.text


@pytest.mark.parametrize(
    "host", ["localhost:99", "127.0.0.1", "[::1]:5", "192.168.1.4", "lamp.example", "LAMP.example:1"]
)
def test_addresses_localhost_and_named_hosts_are_answered(guarded: Running, host: str) -> None:
    assert httpx.get(guarded.v1 + "/models", headers={**KEY, "host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1", "http://127.0.0.1"])
def test_a_page_of_another_origin_is_refused(guarded: Running, origin: str) -> None:
    reply = httpx.post(guarded.v1 + "/chat/completions", headers={**KEY, "origin": origin}, json=ASK)
    assert reply.status_code == 403
    assert "access-control-allow-origin" not in reply.headers
    preflight = httpx.options(guarded.v1 + "/models", headers={"origin": origin})
    assert preflight.status_code == 403


def test_a_named_origin_and_the_servers_own_are_answered(guarded: Running) -> None:
    reply = httpx.get(guarded.v1 + "/models", headers={**KEY, "origin": PAGE})
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-origin"] == PAGE
    preflight = httpx.options(guarded.v1 + "/models", headers={"origin": PAGE})
    assert preflight.headers["access-control-allow-origin"] == PAGE
    own = httpx.get(guarded.v1 + "/models", headers={**KEY, "origin": guarded.url})
    assert own.status_code == 200
    assert "access-control-allow-origin" not in own.headers


@pytest.mark.parametrize("key", [{}, {"authorization": "Bearer no"}, {"x-api-key": "s"}, {"authorization": "secret"}])
@pytest.mark.parametrize("path", ["/v1/models", "/api/tags", "/metrics", "/v1/messages"])
def test_a_wrong_key_is_refused_in_every_dialect(guarded: Running, key: dict[str, str], path: str) -> None:
    reply = httpx.get(guarded.url + path, headers=key)
    assert reply.status_code == 401
    assert "API key" in reply.text
    assert ("type" in reply.json()) == (path == "/v1/messages")


def test_either_header_carries_the_key_and_health_needs_none(guarded: Running) -> None:
    for key in (KEY, {"authorization": "bearer  secret"}, {"x-api-key": "secret"}):
        assert httpx.get(guarded.v1 + "/models", headers=key).status_code == 200
    assert httpx.get(guarded.url + "/health").json()["status"] == "ok"


def test_a_large_body_is_refused_before_it_is_read(guarded: Running) -> None:
    body = b'{"messages": "' + b"x" * 20_000
    reply = httpx.post(guarded.v1 + "/chat/completions", headers=KEY, content=body)
    assert reply.status_code == 413
    assert reply.json()["error"]["type"] == "request_too_large"

    def chunks() -> Iterator[bytes]:
        yield from (b"x" * 4000 for _ in range(5))

    assert httpx.post(guarded.v1 + "/chat/completions", headers=KEY, content=chunks()).status_code == 413


def test_a_body_that_never_arrives_is_given_up(file: Path) -> None:
    with running(file, settings=ServerSettings(body_seconds=0.3)) as server:
        with closing(socket.create_connection(("127.0.0.1", server.port))) as raw:
            raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{")
            raw.settimeout(10)
            assert raw.recv(4096).startswith(b"HTTP/1.1 408")
        assert httpx.get(server.url + "/health").status_code == 200


def post(client: httpx.AsyncClient, url: str, **more: Any) -> Any:
    return client.post(url + "/v1/chat/completions", json={**ASK, "max_tokens": 1000, **more})


def test_more_requests_than_the_queue_holds_get_429_and_a_time_to_retry(endless: Path) -> None:
    async def ask(url: str) -> Any:
        async with httpx.AsyncClient(timeout=60) as client:
            return await asyncio.gather(*(post(client, url, max_tokens=60) for _ in range(12)))

    with running(endless, slots=1, queue=2) as server:
        httpx.post(server.v1 + "/chat/completions", json={**ASK, "max_tokens": 1}, timeout=60)
        replies = asyncio.run(ask(server.url))
    codes = sorted(reply.status_code for reply in replies)
    assert set(codes) == {200, 429}
    assert all(reply.headers["retry-after"] for reply in replies if reply.status_code == 429)


def test_more_requests_than_the_server_answers_get_503(endless: Path) -> None:
    async def ask(url: str) -> Any:
        async with httpx.AsyncClient(timeout=60) as client:
            return await asyncio.gather(*(post(client, url, max_tokens=60) for _ in range(8)))

    with running(endless, settings=ServerSettings(max_requests=2)) as server:
        codes = sorted(reply.status_code for reply in asyncio.run(ask(server.url)))
    assert codes.count(200) >= 2
    assert set(codes) == {200, 503}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_ended_with_an_error(endless: Path, stream: bool) -> None:
    with running(endless, settings=ServerSettings(request_seconds=0.4)) as server:
        httpx.post(server.v1 + "/chat/completions", json={**ASK, "max_tokens": 1}, timeout=60)
        body = {"prompt": ["x"] * 200, "max_tokens": 200, "stream": stream}
        reply = httpx.post(server.v1 + "/completions", json=body, timeout=60)
        assert reply.status_code in ((200, 503) if stream else (503,))
        assert "longer than this server permits" in reply.text
        wait_until_idle(server)


def wait_until_idle(server: Running) -> None:
    """Wait until no request holds a slot; fail after a while."""
    for _ in range(200):
        models = server.server.pool.loaded
        if not server.server.metrics.active and all(
            not model.users and not model.engine.status.active and not model.engine.status.waiting for model in models
        ):
            return
        time.sleep(0.05)
    raise AssertionError("a request still holds a slot")
