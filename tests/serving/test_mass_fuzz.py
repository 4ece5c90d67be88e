"""Nearly sound requests by the hundred thousand, in the process: none crashes the server, hangs or keeps a slot."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from starlette.types import ASGIApp, Message

from edgetune.serving.application import make_application
from edgetune.serving.calls import Server, ServerSettings
from edgetune.serving.loaded_files import LoadSettings, ModelPool, served_files
from tests.serving.structured_requests import FuzzRequest, random_request

_AT_ONCE = 12
_LONGEST = 120.0
_CONTEXT = 512
_ENDS = ("data: [DONE]\n\n", '"type":"message_stop"}\n\n')
_RESPONSE_ENDS = ("response.completed", "response.incomplete", "response.failed")


class FuzzClient:
    """A client without a network: what it is sent, and when it goes away."""

    def __init__(self, request: FuzzRequest) -> None:
        self.request = request
        size = max(1, -(-len(request.body) // request.pieces))
        self._pieces = [request.body[at : at + size] for at in range(0, len(request.body), size)] or [b""]
        self._gone = asyncio.Event()
        if request.gone_after == -1:
            self._pieces.pop()
        elif request.gone_after == 0:
            asyncio.get_running_loop().call_later(0.002, self._gone.set)
        self.messages: list[Message] = []

    async def receive(self) -> Message:
        if self._pieces:
            body = self._pieces.pop(0)
            more = bool(self._pieces) or self.request.gone_after == -1
            return {"type": "http.request", "body": body, "more_body": more}
        if self.request.gone_after == -1:
            return {"type": "http.disconnect"}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self.request.is_slow:
            await asyncio.sleep(0.02)
        self.messages.append(message)
        if len(self.messages) == self.request.gone_after:
            self._gone.set()
        if self.has_left:
            raise OSError("the connection is closed")

    @property
    def has_left(self) -> bool:
        return self._gone.is_set() or self.request.gone_after == -1

    @property
    def scope(self) -> dict[str, Any]:
        headers = {"host": "localhost", "content-type": "application/json", **self.request.headers}
        return {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": self.request.method,
            "scheme": "http", "path": self.request.path, "raw_path": self.request.path.encode(), "query_string": b"",
            "root_path": "", "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
        }  # fmt: skip

    @property
    def text(self) -> str:
        return b"".join(each.get("body", b"") for each in self.messages[1:]).decode()


def find_fault(client: FuzzClient) -> str | None:
    """Return what is wrong with a reply."""
    if client.has_left:
        return None
    if not client.messages:
        return "no reply"
    status, path, text = client.messages[0]["status"], client.request.path, client.text
    media = dict(client.messages[0]["headers"]).get(b"content-type", b"").decode()
    if client.messages[-1].get("more_body"):
        return "the reply has no end"
    if client.request.method == "HEAD":
        return None  # uvicorn leaves the body out
    if status == 200 and "event-stream" in media:
        is_whole = text.endswith(_ENDS) or any(word in text.rsplit("event: ", 1)[-1] for word in _RESPONSE_ENDS)
        return None if is_whole or text.rsplit("event: ", 1)[-1].startswith("error") else "a stream without its end"
    if status == 200 and "ndjson" in media:
        last = json.loads(text.splitlines()[-1])
        return None if last.get("done") or "error" in last else "lines without an end"
    if status == 200:
        return None if "json" not in media or json.loads(text) is not None else "no JSON"
    if status == 500 and '"the answer ' in text.replace('"error":{"message":', '"error":'):
        return None  # the model's answer does not match the schema, which is its fault
    if status not in (400, 403, 404, 405):
        return f"status {status}"
    error = json.loads(text)["error"]
    message = error if path.startswith("/api/") else error["message"]
    return None if isinstance(message, str) and message else "an error without a sentence"


async def fuzz(application: ASGIApp, count: int, seed: int) -> list[str]:
    """Send requests, several at once; return the faults, each with its request."""
    random, faults = Random(seed), []
    room = asyncio.Semaphore(_AT_ONCE)

    async def one(client: FuzzClient) -> None:
        fault: str | None
        try:
            await asyncio.wait_for(application(client.scope, client.receive, client.send), _LONGEST)
            fault = find_fault(client)
        except Exception as error:  # noqa: BLE001 - it is reported with its request
            fault = f"{type(error).__name__}: {error}"
        if fault is not None:
            sent = client.request
            faults.append(f"{fault} for {sent.method} {sent.path} {sent.body!r}: {client.text[:300]}")
        room.release()

    tasks: set[asyncio.Task[None]] = set()
    for _ in range(count):
        await room.acquire()
        task = asyncio.create_task(one(FuzzClient(random_request(random))))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        if len(faults) > 20:
            break
    await asyncio.gather(*tasks)
    return faults


async def _wait_until_idle(server: Server) -> None:
    for _ in range(400):
        models = server.pool.loaded
        busy = any(each.users or each.engine.status.active or each.engine.status.waiting for each in models)
        if not busy and not server.metrics.active:
            return
        await asyncio.sleep(0.025)
    raise AssertionError(f"slots are still held: {[(each.users, each.engine.status) for each in server.pool.loaded]}")


def check(files: tuple[Path, ...], count: int, seed: int) -> None:
    """Send `count` requests to an application, and look at what they leave."""

    async def run() -> None:
        settings = LoadSettings(threads=1, context=_CONTEXT, queue=10_000)
        server = Server(ModelPool(served_files([*map(str, files)]), settings), ServerSettings())
        application = make_application(server)
        try:
            faults = await fuzz(application, count, seed)
            assert not faults, "\n".join(faults)
            await _wait_until_idle(server)
            assert len(asyncio.all_tasks()) == 1
            text = '{"prompt": "dim", "max_tokens": 2, "temperature": 0, "model": "tiny"}'
            last = FuzzClient(FuzzRequest("POST", "/v1/completions", text.encode()))
            await application(last.scope, last.receive, last.send)
            assert last.messages[0]["status"] == 200
        finally:
            await server.pool.close()

    started, engines = time.monotonic(), _count_engines()
    asyncio.run(run())
    gc.collect()
    assert _count_engines() == engines
    print(f"{count} requests in {time.monotonic() - started:.0f} s")


def _count_engines() -> int:
    return sum(each.name == "edgetune-engine" for each in threading.enumerate())


def test_hundreds_of_requests_leave_no_slot_and_no_task(file: Path, folder: Path) -> None:
    check((file, folder), 500, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_hundred_thousand_requests_leave_no_slot_and_no_task(file: Path, folder: Path, seed: int) -> None:
    check((file, folder), 10_000, 100 + seed)
